// Before the Hopper backward kernel: statistics of every row, and a clean workspace.
#pragma once

#include "cuda/device/sm90/backward_row_stats.h"

namespace anymask::cuda {

// With a warp, for a row tile of the workspace.
template <BackwardConfig C>
__device__ __forceinline__ void clear_sums(const BackwardParams& p, int64_t row_tile, int lane) {
  if constexpr (!C.has_turns()) {
    float4* q_sums = reinterpret_cast<float4*>(p.q_sums + row_tile * (kBackwardRows * C.depth));
#pragma unroll 8
    for (int i = lane; i < kBackwardRows * C.depth / 4; i += 32) {
      q_sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
  } else {
    if (lane == 0) p.turns[row_tile] = 0;
    // The first key tile of a row tile stores, the last one writes dQ; this is for those of none.
    const RowTilePlace at = place_of(p, row_tile);
    if (p.rows.count[map_row(p, p.rows, mask_place(p, at.batch, at.head), at.tile)] != 0) return;
    uint16_t* to = static_cast<uint16_t*>(p.q_grad) + at.batch * p.q_grad_batch_stride +
                   at.head * p.q_grad_head_stride;
    for (int i = lane; i < kBackwardRows * C.depth / 8; i += 32) {
      const int row = at.first_row() + i / (C.depth / 8), column = i % (C.depth / 8) * 8;
      if (row < p.q_len && column < p.depth) {
        ptx::store_global(to + row * p.q_grad_row_stride + column, 0, 0, 0, 0);
      }
    }
  }
}

template <BackwardConfig C>
__device__ __forceinline__ void backward_prepare_kernel(const BackwardParams& p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.next_item = 0;
  if (p.splits()) {  // that kernel makes statistics itself, and nobody adds
    if (blockIdx.x == 0) {
      const int counters = kPairTiles + p.batch * p.kv_heads;
      for (int i = threadIdx.x; i < counters; i += kPrepareThreads) p.known[i] = 0;
    }
    return;
  }
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int kWarps = kPrepareThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row_tiles = int64_t{p.batch} * p.q_heads * p.row_tiles;
  int64_t row_tile = int64_t{warp} * gridDim.x + blockIdx.x;  // blocks first: they may be few
  if (row_tile >= row_tiles) return;
  constexpr int kStages = prepare_stages(C.value_depth);
  WarpRows<C.half != 0, C.value_depth, kStages> rows{
      p, lane, memory + warp * kStages * row_stats_bytes(C.value_depth)};
  rows.begin(row_tile);
  while (row_tile < row_tiles) {
    clear_sums<C>(p, row_tile, lane);
    const int64_t next = row_tile + int64_t{gridDim.x} * kWarps;
    rows.make(row_tile, [&] { next < row_tiles ? rows.point_to(next) : rows.point_to_none(); });
    row_tile = next;
  }
  ptx::copies_wait<0>();
}

}  // namespace anymask::cuda
