// What the backward pass knows of a query row before it begins.
//
// dS = P (dP - (rowsum(dO O) - dlse)), so what is taken from dP is one number a row, as is what is
// taken from S. Rows that see nothing or do not exist get an lse so large that their P is 0; it
// must not be infinite, since products with constants of 0 meet it too.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/mma.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_places.h"
#include "cuda/device/sm90/softmax.h"  // kMinusInfinity

namespace anymask::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float two_to(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// What is left of `value` after its part in units of 2^exponent, which goes to `part`.
template <bool kHalf>
__device__ __forceinline__ float take_part(float value, int exponent, uint32_t& part) {
  const float unit = two_to(exponent), inverse = two_to(-exponent);
  part = (kHalf ? ptx::pack_f16(value * inverse, 0.0f) : ptx::pack_bf16(value * inverse, 0.0f)) &
         0xffffu;
  return value - ptx::low_of<kHalf>(part) * unit;
}

// A row's numbers: see kRowStats.
template <bool kHalf>
__device__ __forceinline__ void store_stats(const BackwardParams& p, uint16_t* to, bool sees,
                                            float lse, float sum) {
  constexpr float kHuge = 60000.0f;  // in fp16 too
  uint32_t parts[kRowStats] = {};
  if (sees) {
    float left = lse * kLog2E / -p.scale_log2;
#pragma unroll
    for (int i = 0; i < kLseParts; ++i) left = take_part<kHalf>(left, p.lse_exponent, parts[i]);
  } else {
    take_part<kHalf>(p.scale_log2 > 0 ? -kHuge : kHuge, 0, parts[0]);
  }
  float left = -sum;
#pragma unroll
  for (int i = 0; i < kSumParts; ++i) {
    left = take_part<kHalf>(left, sum_exponent(i), parts[kLseParts + i]);
  }
  ptx::store_global(to, parts[0] | parts[1] << 16, parts[2] | parts[3] << 16,
                    parts[4] | parts[5] << 16, parts[6] | parts[7] << 16);
}

// A row's numbers as they were before they were taken apart: its lse times log2(e), or what leaves
// nothing of any score, and its sum.
struct RowNumbers {
  float lse, sum;
};

template <bool kHalf>
__device__ __forceinline__ RowNumbers read_stats(const BackwardParams& p,
                                                 const uint16_t (&of_row)[kRowStats]) {
  const uint4 all = *reinterpret_cast<const uint4*>(of_row);
  const uint32_t pairs[4] = {all.x, all.y, all.z, all.w};
  const auto part = [&](int i) {
    const uint32_t pair = pairs[i / 2];
    return i % 2 == 0 ? ptx::low_of<kHalf>(pair) : ptx::high_of<kHalf>(pair);
  };
  float lse = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = kLseParts - 1; i >= 0; --i) lse += part(i);
#pragma unroll
  for (int i = kSumParts - 1; i >= 0; --i) {
    sum = __fmaf_rn(part(kLseParts + i), two_to(sum_exponent(i)), sum);
  }
  return {-lse * two_to(p.lse_exponent) * p.scale_log2, -sum};
}

// The natural log and its gradient of a row: -infinity where it does not exist or sees nothing.
struct RowLse {
  float lse, grad;
};

// at: of [batch][q_heads][q_len].
__device__ __forceinline__ RowLse read_lse(const BackwardParams& p, int64_t at, bool exists) {
  return {exists ? p.lse[at] : kMinusInfinity,
          exists && p.lse_grad != nullptr ? p.lse_grad[at] : 0.0f};
}

// Stores what is known of row `in_tile` of a row tile. sum: of dO O.
template <bool kHalf>
__device__ __forceinline__ void store_row(const BackwardParams& p, int64_t row_tile, int in_tile,
                                          const RowLse& of, float sum) {
  const bool sees = of.lse > kMinusInfinity;
  sum = sees ? sum - of.grad : 0.0f;
  store_stats<kHalf>(p, p.stats + (row_tile * kBackwardRows + in_tile) * kRowStats, sees, of.lse,
                     sum);
  if (p.row_numbers != nullptr) {
    float* numbers = p.row_numbers + row_tile * (2 * kBackwardRows) + in_tile;
    numbers[kLseOfRow * kBackwardRows] = sees ? of.lse * kLog2E : -kMinusInfinity;
    numbers[kSumOfRow * kBackwardRows] = sum;
  }
}

// A warp makes the numbers of one row tile after another, and has the next rows on their way
// meanwhile: kStages blocks of 8 rows of O and dO, in shared memory of its own. (Through registers
// they would need as much of L1 until they are there. Beside 220 KiB of shared memory that is 28
// KiB a multiprocessor, which then reads 30 GB/s.) Sums of dO O are the diagonals of products on
// the tensor cores: in float32, and then over lanes, they are three times as many instructions.
template <bool kHalf, int kDepth, int kStages>
struct WarpRows {
  static constexpr int kRows = 8;  // of a block
  static constexpr int kBlocks = kBackwardRows / kRows;
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kTensorBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = row_stats_bytes(kDepth);
  static_assert(kStageBytes == 2 * kTensorBytes && kBlocks / 2 % kStages == 0);

  const BackwardParams& p;
  const int lane;
  uint8_t* const stages;
  // What is asked for next: this lane's part of the rows from `next_row` on of a head.
  const uint16_t *outs, *grads;
  int next_row;
  RowLse ahead[2];  // of the tile of those: of its row `lane`, and of row 32 + lane

  // Lanes of a row, 16 bytes each.
  static constexpr int kLanes = kDepth / 8;
  __device__ __forceinline__ int column() const { return lane % kLanes; }
  __device__ __forceinline__ int row() const { return lane / kLanes; }

  // row_tile: of the workspace.
  __device__ __forceinline__ void point_to(int64_t row_tile) {
    const RowTilePlace at = place_of(p, row_tile);
    next_row = at.first_row();
    const int64_t first = next_row + row();
    outs = static_cast<const uint16_t*>(p.out) + at.batch * p.out_batch_stride +
           at.head * p.out_head_stride + first * p.out_row_stride + 8 * column();
    grads = static_cast<const uint16_t*>(p.grad) + at.batch * p.grad_batch_stride +
            at.head * p.grad_head_stride + first * p.grad_row_stride + 8 * column();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of = next_row + 32 * i + lane;
      ahead[i] = read_lse(p, int64_t{at.head_index} * p.q_len + of, of < p.q_len);
    }
  }

  // All that is asked for from now on are zeros.
  __device__ __forceinline__ void point_to_none() { next_row = p.q_len; }

  // Asks for the next block. Of every second row the halves of 128 bytes change places, so that
  // neither the copies nor read() meet in a bank.
  __device__ __forceinline__ void ask(int stage) {
    constexpr int kAtOnce = 32 / kLanes;
#pragma unroll
    for (int i = 0; i < kRows; i += kAtOnce) {
      const int at = i + row();
      const bool exists = next_row + at < p.q_len && 8 * column() < p.value_depth;
      const uint32_t to = ptx::shared_address(stages) + stage * kStageBytes + at * kRowBytes +
                          16 * (column() ^ at % 2 * 4);
      ptx::copy_sixteen(to, outs + i * p.out_row_stride, exists);
      ptx::copy_sixteen(to + kTensorBytes, grads + i * p.grad_row_stride, exists);
    }
    ptx::copies_commit();
    next_row += kRows;
    outs += kRows * p.out_row_stride;
    grads += kRows * p.grad_row_stride;
  }

  // tensor: 0 is O, 1 is dO. Of row lane / 4, 8 of the columns from 32 i on.
  __device__ __forceinline__ uint4 read(int stage, int tensor, int i) const {
    const int at = lane / 4;
    return *reinterpret_cast<const uint4*>(stages + stage * kStageBytes + tensor * kTensorBytes +
                                           at * kRowBytes + 16 * ((4 * i + lane % 4) ^ at % 2 * 4));
  }

  // The sum of row `lane` % 8 of a block.
  __device__ __forceinline__ float sum_of(int stage) const {
    // A row of dO is two rows of a, with half of the columns each: so registers are in the order in
    // which 16 bytes come.
    float firsts[4] = {}, seconds[4] = {};
#pragma unroll
    for (int i = 0; i < kDepth / 32; ++i) {
      const uint4 a = read(stage, 1, i), b = read(stage, 0, i);
      ptx::multiply_16x8<kHalf>(firsts, a, b.x, b.z);
      ptx::multiply_16x8<kHalf>(seconds, a, b.y, b.w);
    }
    // A row meets itself, column l / 4, in lanes with l % 4 = l / 4 / 2.
    const float on_diagonal = lane / 4 % 2 == 0 ? firsts[0] + seconds[2] : firsts[1] + seconds[3];
    return __shfl_sync(0xffffffffu, on_diagonal, lane % 8 * 4 + lane % 8 / 2);
  }

  __device__ __forceinline__ void begin(int64_t row_tile) {
    point_to(row_tile);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) ask(stage);
  }

  // Stores what is known of the tile whose rows come first. point_to_next(): to the one after it.
  template <typename Next>
  __device__ __forceinline__ void make(int64_t row_tile, Next&& point_to_next) {
    const RowLse of[2] = {ahead[0], ahead[1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kBlocks / 2; ++i) {
        if (half * kBlocks / 2 + i + kStages == kBlocks) point_to_next();
        const int stage = i % kStages;
        ptx::copies_wait<kStages - 1>();
        __syncwarp();  // others' copies are there, too
        const float of_row = sum_of(stage);
        if (lane / kRows == i) sum = of_row;
        __syncwarp();  // others have read
        ask(stage);
      }
      store_row<kHalf>(p, row_tile, half * 32 + lane, of[half], sum);
    }
  }
};

}  // namespace anymask::cuda
