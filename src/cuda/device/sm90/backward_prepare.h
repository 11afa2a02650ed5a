// Before the Hopper backward kernel: statistics of every row, and a clean workspace.
#pragma once

#include "cuda/device/sm90/backward_places.h"
#include "cuda/device/sm90/backward_row_stats.h"

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
  // Everything is read before anything is used: a block has one trip to memory to wait for.
  const bool splits = p.splits();
  float sums[kRows];
  RowLse lses[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kRowsAtOnce + thread / kPrepareLanes;
    const int64_t at = static_cast<int64_t>(head_index) * p.q_len + row;
    lses[i] = read_lse(p, at, part == 0 && row < p.q_len);
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

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float sum = sums[i];
#pragma unroll
    for (int step = kPrepareLanes / 2; step > 0; step /= 2) sum += ptx::shuffle_xor(sum, step);
    const int in_tile = i * kRowsAtOnce + thread / kPrepareLanes;
    if (part == 0) store_row<C.half != 0>(p, row_tile, in_tile, lses[i], sum);
  }
}

}  // namespace anymask::cuda
