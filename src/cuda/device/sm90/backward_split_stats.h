// Statistics of rows in the Hopper backward kernel that makes dQ apart from dK and dV.
//
// A launch of its own for them (backward_prepare.h) reads O and dO at memory's full speed, while
// this kernel leaves memory idle half of the time. So some of the blocks make them here, ahead of
// the others' items, and go on to items when there are no more.
#pragma once

#include "cuda/device/sm90/backward_row_stats.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_split_shared.h"

namespace anymask::cuda {

// Row tiles that a kv head's group has.
__device__ __forceinline__ int row_tiles_of_pair(const BackwardParams& p) {
  return p.group_heads * p.row_tiles;
}

// Counts those that are done. pair: batch * kv_heads + kv_head.
__device__ __forceinline__ int32_t* known_of_pair(const BackwardParams& p, int pair) {
  return p.known + kPairTiles + pair;
}

// Where a warp's row tiles come from, in the order of heads: those that first items need; then, if
// its block stays, the others. Two counters, so that nobody draws one that he has to make while his
// items wait.
struct RowTileSource {
  const SplitParams& p;
  const bool stays;
  const int all;
  const int lane;
  bool early = true;
  int asked = 0;

  // Ahead of take().
  __device__ __forceinline__ void ask() {
    asked = ask_for_item(p.keys.known + (early ? kEarlyTiles : kLateTiles), lane);
  }

  // The next one, or `all` and more.
  __device__ __forceinline__ int take() {
    const int next = drawn(asked);
    if (!early) return p.early_row_tiles + next;
    if (next < p.early_row_tiles) return next;
    early = false;
    return stays ? p.early_row_tiles + draw_item(p.keys.known + kLateTiles, lane) : all;
  }
};

// With a whole block, before anything else is in its slots. Whoever waits for a row tile waits for
// a warp that has begun it, or for blocks that were scheduled before any other.
template <SplitConfig C>
__device__ __forceinline__ void make_split_stats(const SplitParams& p, SplitShared<C>& shared,
                                                 int warp, int lane) {
  constexpr int kStages = C.stats_stages();
  constexpr int kBytes = kStages * row_stats_bytes(C.value_depth);
  constexpr int kWarps = C.threads() / 32;
  static_assert(kWarps * kBytes <= sizeof(shared.inner) + sizeof(shared.values));
  const int all = p.keys.batch * p.keys.q_heads * p.keys.row_tiles;
  RowTileSource source{p, static_cast<int>(blockIdx.x) < p.stats_blocks, all, lane};
  WarpRows<C.half != 0, C.value_depth, kStages> rows{p.keys, lane,
                                                     &shared.inner[0][0][0] + warp * kBytes};
  source.ask();
  int row_tile = source.take();
  if (row_tile < all) rows.begin(row_tile);
#pragma unroll 1
  while (row_tile < all) {
    source.ask();
    int next = all;
    rows.make(row_tile, [&] {
      next = source.take();
      next < all ? rows.point_to(next) : rows.point_to_none();
    });
    __syncwarp();
    if (lane == 0) ptx::add_release(known_of_pair(p.keys, row_tile / row_tiles_of_pair(p.keys)), 1);
    row_tile = next;
  }
  ptx::copies_wait<0>();
  ptx::fence_async_shared();  // slots are the copy engine's from now on
}

}  // namespace anymask::cuda
