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

// Row tiles that a kv head's group has: BackwardParams::known counts those that are done.
__device__ __forceinline__ int row_tiles_of_pair(const BackwardParams& p) {
  return p.group_heads * p.row_tiles;
}

// With a warp: row tile after row tile, in the order of heads, until one is drawn that is not
// before `until`: that one is made, too, if it is of `all`.
template <typename Rows>
__device__ __forceinline__ void make_drawn_rows(Rows& rows, int until, int all) {
  const BackwardParams& p = rows.p;
  int row_tile = draw_item(p.known, rows.lane);
  if (row_tile >= all) return;
  rows.begin(row_tile);
  while (row_tile < all) {
    const bool more = row_tile < until;
    const int asked = more ? ask_for_item(p.known, rows.lane) : 0;
    int next = all;
    rows.make(row_tile, [&] {
      if (more) next = drawn(asked);
      next < all ? rows.point_to(next) : rows.point_to_none();
    });
    __syncwarp();
    if (rows.lane == 0) ptx::add_release(p.known + 1 + row_tile / row_tiles_of_pair(p), 1);
    row_tile = next;
  }
  ptx::copies_wait<0>();
}

// With a whole block, before anything else is in its slots. All warps make the row tiles that first
// items need, the first blocks' warps those that are left. Whoever waits for one waits for a warp
// that has drawn it, or for blocks that were scheduled before any other.
template <SplitConfig C>
__device__ __forceinline__ void make_split_stats(const SplitParams& p, SplitShared<C>& shared,
                                                 int warp, int lane) {
  constexpr int kStages = C.stats_stages();
  constexpr int kBytes = kStages * row_stats_bytes(C.value_depth);
  static_assert(C.threads() / 32 * kBytes <= sizeof(shared.inner) + sizeof(shared.values));
  const bool stays = static_cast<int>(blockIdx.x) < p.stats_blocks;
  const int all = p.keys.batch * p.keys.q_heads * p.keys.row_tiles;
  WarpRows<C.half != 0, C.value_depth, kStages> rows{p.keys, lane,
                                                     &shared.inner[0][0][0] + warp * kBytes};
  make_drawn_rows(rows, stays ? all : p.early_row_tiles, all);
  ptx::fence_async_shared();  // slots are the copy engine's from now on
}

}  // namespace anymask::cuda
