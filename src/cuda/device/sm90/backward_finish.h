// After the Hopper backward kernel, unless sums are chained: the float32 sums of dQ, scaled and
// rounded, to the caller's tensor. The sums lie in the order of the accumulators that made them, so
// a thread here reads what one math thread added, 16 bytes at a time.
#pragma once

#include "cuda/device/sm90/backward_places.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

template <BackwardConfig C>
__device__ __forceinline__ void backward_finish_kernel(const BackwardParams& p) {
  if (p.splits()) return;
  const int w = threadIdx.x / 128, thread = threadIdx.x % 128;
  // Of all of the workspace.
  const int64_t row_tiles = int64_t{p.batch} * p.q_heads * p.row_tiles;
  for (int64_t row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x) {
    const RowTilePlace at = place_of(p, row_tile);

    constexpr int kPart = C.part_depth();
    float values[kPart / 2];
    const float4* sums =
        reinterpret_cast<const float4*>(p.q_sums + row_tile * (kBackwardRows * C.depth) +
                                        w * kBackwardRows * kPart) +
        thread;
#pragma unroll
    for (int i = 0; i < kPart / 8; ++i) {
      const float4 four = sums[128 * i];
      values[4 * i] = four.x;
      values[4 * i + 1] = four.y;
      values[4 * i + 2] = four.z;
      values[4 * i + 3] = four.w;
    }
    uint16_t* to = static_cast<uint16_t*>(p.q_grad) + at.batch * p.q_grad_batch_stride +
                   at.head * p.q_grad_head_stride + w * kPart;
    store_rows<C.half != 0>(values, p.scale, to, p.q_grad_row_stride, nullptr, at.first_row(),
                            p.q_len, p.depth - w * kPart, thread / 32, thread % 32);
  }
}

}  // namespace anymask::cuda
