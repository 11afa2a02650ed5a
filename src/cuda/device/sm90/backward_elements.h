// What math threads of the Hopper backward kernel do element by element, and how fragments of P^T
// and dS^T reach shared memory.
//
// Everything is transposed: rows are keys, columns are queries. Of a 64 x 64 piece a thread holds
// keys lane / 4 and lane / 4 + 8 of its warp's 16, and of each 8 queries two: 8k + 2q and 8k + 2q +
// 1, q = lane % 4. Value i belongs to k = i / 4, key r = i / 2 % 2, query i % 2.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

// Waits until all key tiles that go before have added to this step's row tile of dQ.
__device__ __forceinline__ void await_turn(const int32_t* turns, const BackwardStep& step) {
  if (step.turn == 0) return;
  while (ptx::load_acquire(turns) < step.turn) __nanosleep(32);
}

inline constexpr int kPieceValues = kBackwardRows / 2;  // of a thread, in a 64 x 64 piece

template <bool kHalf>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}

// P = exp2(S * scale - lse), in place.
__device__ __forceinline__ void weights_from_scores(float (&values)[kPieceValues],
                                                    const float* lse_stats, float scale_log2,
                                                    int q) {
  const float4* lse = reinterpret_cast<const float4*>(lse_stats) + q;
#pragma unroll
  for (int pair = 0; pair < kBackwardRows / 16; ++pair) {
    const float4 four = lse[4 * pair];
#pragma unroll
    for (int i = 8 * pair; i < 8 * pair + 8; ++i) {
      const float low = i % 8 < 4 ? four.x : four.z, high = i % 8 < 4 ? four.y : four.w;
      values[i] = ptx::exp2_fast(values[i] * scale_log2 - (i % 2 == 0 ? low : high));
    }
  }
}

// P = 0 where a pair is hidden. words[r]: 64 rows of this thread's key r, shifted right by 2q.
// (P, not S: with a negative scale a score of -infinity would become a weight of +infinity.)
__device__ __forceinline__ void hide(float (&values)[kPieceValues], const uint32_t (&words)[2][2]) {
#pragma unroll
  for (int i = 0; i < kPieceValues; ++i) {
    const int k = i / 4, bit = 8 * (k % 4) + i % 2;
    const bool visible = (words[(i / 2) % 2][k / 4] >> bit) & 1;
    values[i] = visible ? values[i] : 0.0f;
  }
}

// Reads the words of this thread's two keys; `key`: the first of them.
__device__ __forceinline__ void read_words(const uint32_t (*bits)[2], int key, int q,
                                           uint32_t (&words)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint2 both = *reinterpret_cast<const uint2*>(bits[key + 8 * r]);
    words[r][0] = both.x >> (2 * q);
    words[r][1] = both.y >> (2 * q);
  }
}

// dS = P (dP - sums), packed as an A operand. `weight(i)` is P.
template <bool kHalf, typename Weight>
__device__ __forceinline__ void pack_slopes(const float (&weight_grads)[kPieceValues],
                                            const float* sum_stats, int q, Weight&& weight,
                                            uint32_t (&slopes)[kPieceValues / 2]) {
  const float4* sums = reinterpret_cast<const float4*>(sum_stats) + q;
#pragma unroll
  for (int pair = 0; pair < kBackwardRows / 16; ++pair) {
    const float4 four = sums[4 * pair];
#pragma unroll
    for (int i = 8 * pair; i < 8 * pair + 8; i += 2) {
      const float first = weight(i) * (weight_grads[i] - (i % 8 < 4 ? four.x : four.z));
      const float second = weight(i + 1) * (weight_grads[i + 1] - (i % 8 < 4 ? four.y : four.w));
      slopes[i / 2] = pack_pair<kHalf>(first, second);
    }
  }
}

// Where this lane's row of matrices lies in a tile of 64-query rows under the 128-byte swizzle, for
// queries 0..15 (the upper 8 for lanes from 16 on); 16 queries further is an exclusive or.
__device__ __forceinline__ uint32_t fragment_address(const void* tile, int first_key, int lane) {
  const int key = first_key + lane % 16;
  return ptx::shared_address(tile) + key * kSlabRowBytes + (((lane / 16) ^ (lane % 8)) << 4);
}

__device__ __forceinline__ void store_fragments(uint32_t address,
                                                const uint32_t (&packed)[kPieceValues / 2]) {
#pragma unroll
  for (int step = 0; step < kBackwardRows / 16; ++step) {
    ptx::store_matrices(address ^ (step << 5), packed[4 * step], packed[4 * step + 1],
                        packed[4 * step + 2], packed[4 * step + 3]);
  }
}

__device__ __forceinline__ void load_fragments(uint32_t address,
                                               uint32_t (&packed)[kPieceValues / 2]) {
#pragma unroll
  for (int step = 0; step < kBackwardRows / 16; ++step) {
    ptx::load_matrices(address ^ (step << 5), &packed[4 * step]);
  }
}

// Adds a warpgroup's part of dQ from registers to the workspace; chained: when its turn has come,
// and the first one stores, so that nobody has to clear the sums before.
template <BackwardConfig C, int kCount>
__device__ __forceinline__ void add_in_turn(const BackwardParams& p, const BackwardStep& step,
                                            int w, int thread, const float (&values)[kCount]) {
  constexpr int kFloats = kBackwardRows * C.part_depth();
  float* to = p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
              w * kFloats + 4 * thread;
  int32_t* turns = p.turns + 2 * static_cast<int64_t>(step.row_tile) + w;
  if constexpr (C.chained != 0) {
    if (thread == 0) await_turn(turns, step);
    ptx::named_sync(kTurnBarrier + w, 128);
  }
  if (C.chained != 0 && step.turn == 0) {
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      *reinterpret_cast<float4*>(to + 512 * i) = {values[4 * i], values[4 * i + 1],
                                                  values[4 * i + 2], values[4 * i + 3]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      ptx::add_four(to + 512 * i, values[4 * i], values[4 * i + 1], values[4 * i + 2],
                    values[4 * i + 3]);
    }
  }
  if constexpr (C.chained != 0) {
    __threadfence();
    ptx::named_sync(kTurnBarrier + w, 128);
    if (thread == 0) ptx::add_release(turns, 1);
  }
}

// Chained: whoever is last takes the sum of those before and writes dQ itself.
template <BackwardConfig C, int kCount>
__device__ __forceinline__ void finish_in_turn(const BackwardParams& p, const BackwardStep& step,
                                               int batch, int w, int thread,
                                               float (&values)[kCount]) {
  constexpr int kFloats = kBackwardRows * C.part_depth();
  if (step.turn > 0) {
    // Staged, the sending warp counts both halves at once.
    const int32_t* turns =
        p.turns + 2 * static_cast<int64_t>(step.row_tile) + (C.staged != 0 ? 0 : w);
    if (thread == 0) await_turn(turns, step);
    ptx::named_sync(kTurnBarrier + w, 128);
    const float* from = p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
                        w * kFloats + 4 * thread;
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      float before[4];
      ptx::load_four(from + 512 * i, before);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * i + j] += before[j];
    }
  }
  const int tile = step.row_tile - (batch * p.q_heads + step.last_head) * p.row_tiles;
  uint16_t* to = static_cast<uint16_t*>(p.q_grad) + batch * p.q_grad_batch_stride +
                 step.last_head * p.q_grad_head_stride + w * C.part_depth();
  store_rows<C.half != 0>(values, p.scale, to, p.q_grad_row_stride, nullptr, tile * kBackwardRows,
                          p.q_len, p.depth - w * C.part_depth(), thread / 32, thread % 32);
}

}  // namespace anymask::cuda
