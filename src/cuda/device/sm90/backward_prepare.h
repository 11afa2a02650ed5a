// Before the Hopper backward kernel: statistics of every row, and a clean workspace.
//
// dS = P (dP - (rowsum(dO O) - dlse)), so what is taken from dP is one number a row, as is what is
// taken from S. Rows that see nothing or do not exist get an lse so large that their P is 0; it
// must not be infinite, since products with constants of 0 meet it too.
#pragma once

#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_places.h"

namespace anymask::cuda {

inline constexpr int kPrepareThreads = 256;
inline constexpr int kPrepareLanes = 16;  // of a row: 8 elements each, twice where that is too few

// The share of rowsum(dO O) in 8 columns.
template <bool kHalf>
__device__ __forceinline__ float dot_eight(const uint16_t* a, const uint16_t* b) {
  const uint4 x = *reinterpret_cast<const uint4*>(a);
  const uint4 y = *reinterpret_cast<const uint4*>(b);
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += ptx::low_of<kHalf>(xs[i]) * ptx::low_of<kHalf>(ys[i]);
    sum += ptx::high_of<kHalf>(xs[i]) * ptx::high_of<kHalf>(ys[i]);
  }
  return sum;
}

// What is left of `value` after its part in units of 2^exponent, which goes to `part`.
template <bool kHalf>
__device__ __forceinline__ float take_part(float value, int exponent, uint32_t& part) {
  const float unit = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
  const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
  part = (kHalf ? ptx::pack_f16(value * inverse, 0.0f) : ptx::pack_bf16(value * inverse, 0.0f)) &
         0xffffu;
  return value - ptx::low_of<kHalf>(part) * unit;
}

// A row's numbers: see kRowStats.
template <bool kHalf>
__device__ __forceinline__ void store_stats(const BackwardParams& p, uint16_t* to, bool sees,
                                            float lse, float sum) {
  constexpr float kLog2E = 1.4426950408889634f;
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

template <BackwardConfig C>
__device__ __forceinline__ void backward_prepare_kernel(const BackwardParams& p) {
  const int64_t row_tile = blockIdx.x;  // of all of the workspace
  const int head_index = static_cast<int>(row_tile / p.row_tiles);
  const int first_row =
      static_cast<int>(row_tile - int64_t{head_index} * p.row_tiles) * kBackwardRows;
  const int batch = head_index / p.q_heads, head = head_index - batch * p.q_heads;
  const int thread = threadIdx.x, part = thread % kPrepareLanes;

  const uint16_t* out =
      static_cast<const uint16_t*>(p.out) + batch * p.out_batch_stride + head * p.out_head_stride;
  const uint16_t* grad = static_cast<const uint16_t*>(p.grad) + batch * p.grad_batch_stride +
                         head * p.grad_head_stride;
  constexpr int kRowsAtOnce = kPrepareThreads / kPrepareLanes;
  constexpr int kRows = kBackwardRows / kRowsAtOnce;
  const float infinity = __uint_as_float(0x7f800000u);
  // Everything is read before anything is used: a block has one trip to memory to wait for.
  const bool splits = p.splits();
  float sums[kRows], lses[kRows], lse_grads[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kRowsAtOnce + thread / kPrepareLanes;
    const int64_t at = static_cast<int64_t>(head_index) * p.q_len + row;
    const bool mine = part == 0 && row < p.q_len;
    lses[i] = mine ? p.lse[at] : -infinity;
    lse_grads[i] = mine && p.lse_grad != nullptr ? p.lse_grad[at] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kRowsAtOnce + thread / kPrepareLanes;
    sums[i] = 0.0f;
#pragma unroll
    for (int column = 8 * part; column < C.value_depth; column += 8 * kPrepareLanes) {
      if (row < p.q_len && column < p.value_depth) {
        sums[i] += dot_eight<C.half != 0>(out + row * p.out_row_stride + column,
                                          grad + row * p.grad_row_stride + column);
      }
    }
  }

  if (splits) {
    // Nobody adds.
  } else if constexpr (!C.has_turns()) {
    float4* q_sums = reinterpret_cast<float4*>(p.q_sums + row_tile * (kBackwardRows * C.depth));
#pragma unroll
    for (int i = 0; i < kBackwardRows * C.depth / 4; i += kPrepareThreads) {
      q_sums[i + thread] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
  } else {
    // The first key tile of a row tile stores, the last one writes dQ; this is for those of none.
    const rules::Place place = mask_place(p, batch, head);
    if (p.rows.count[map_row(p, p.rows, place, first_row / kBackwardRows)] == 0) {
      uint16_t* to = static_cast<uint16_t*>(p.q_grad) + batch * p.q_grad_batch_stride +
                     head * p.q_grad_head_stride;
      for (int i = thread; i < kBackwardRows * C.depth / 8; i += kPrepareThreads) {
        const int row = first_row + i / (C.depth / 8), column = i % (C.depth / 8) * 8;
        if (row < p.q_len && column < p.depth) {
          ptx::store_global(to + row * p.q_grad_row_stride + column, 0, 0, 0, 0);
        }
      }
    }
  }
  if (C.has_turns() && thread == 0) p.turns[row_tile] = 0;
  if (row_tile == 0 && thread == 0) *p.next_item = 0;

  uint16_t* stats = p.stats + row_tile * (kBackwardRows * kRowStats);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float sum = sums[i];
#pragma unroll
    for (int step = kPrepareLanes / 2; step > 0; step /= 2) sum += ptx::shuffle_xor(sum, step);
    const int in_tile = i * kRowsAtOnce + thread / kPrepareLanes;
    if (part != 0) continue;
    const float lse = lses[i];
    const bool sees = lse > -infinity;
    sum -= lse_grads[i];
    store_stats<C.half != 0>(p, stats + in_tile * kRowStats, sees, lse, sees ? sum : 0.0f);
    if constexpr (C.has(kRowNumbers)) {
      constexpr float kLog2E = 1.4426950408889634f;
      float* numbers = p.row_numbers + row_tile * (2 * kBackwardRows) + in_tile;
      numbers[kLseOfRow * kBackwardRows] = sees ? lse * kLog2E : infinity;
      numbers[kSumOfRow * kBackwardRows] = sees ? sum : 0.0f;
    }
  }
}

}  // namespace anymask::cuda
