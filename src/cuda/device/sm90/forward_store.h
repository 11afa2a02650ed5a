// The end of an item of the Hopper forward kernel: a math warp's 16 rows of the output and their
// lse, straight from registers.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/forward_shared.h"
#include "cuda/device/sm90/softmax.h"

namespace anymask::cuda {

// Two numbers of the output's type.
template <ForwardConfig C>
__device__ __forceinline__ uint32_t pack_output(float low, float high) {
  return C.half ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}

// kCount / 2 numbers of each of the thread's two rows, which are 8 apart from first_row on: those
// of kCount * 2 columns from first_column on. q: its place in the quad that holds them.
template <ForwardConfig C, int kCount>
__device__ __forceinline__ void store_output(const ForwardParams& p, const Item& item,
                                             int first_row, int q, const RowState& rows,
                                             const float (&out)[kCount], int first_column = 0) {
  const float sink = sink_log2<C.half != 0>(p.scores.sink, item.head);
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    // The sink is one more score, without a value.
    const float top = fmaxf(rows.top[r], sink);
    const float rescale = ptx::exp2_fast(rows.top[r] - top);
    sum = sum * rescale + ptx::exp2_fast(sink - top);
    const bool seen = sum > 0.0f;
    inverse[r] = seen ? rescale / sum : 0.0f;
    if constexpr (C.has(kDropout)) inverse[r] *= p.scores.keep_scale;
    const int row = first_row + 8 * r;
    if (q == 0 && first_column == 0 && row < p.q_len && p.lse != nullptr) {
      constexpr float kLn2 = 0.69314718055994531f;
      const float lse = seen ? (top + ptx::log2_fast(sum)) * kLn2 : kMinusInfinity;
      p.lse[(static_cast<int64_t>(item.batch) * p.q_heads + item.head) * p.q_len + row] = lse;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    uint16_t* to = static_cast<uint16_t*>(p.out) + item.batch * p.out_batch_stride +
                   item.head * p.out_head_stride + row * p.out_row_stride;
    // Quads gather 8 columns a lane, so that a row is written 64 bytes at a time.
#pragma unroll
    for (int j = 0; j < kCount / 16; ++j) {
      uint32_t pieces[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * r;
        pieces[i] = pack_output<C>(out[at] * inverse[r], out[at + 1] * inverse[r]);
      }
      transpose_quad(pieces, q);
      const int column = first_column + 8 * (4 * j + q);
      if (row < p.q_len && column < p.value_depth) {
        ptx::store_global(to + column, pieces[0], pieces[1], pieces[2], pieces[3]);
      }
    }
  }
}

}  // namespace anymask::cuda
