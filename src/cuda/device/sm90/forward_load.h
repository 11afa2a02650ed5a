// The loading warp of the Hopper forward kernel: draws items, publishes them to the other warps,
// and copies Q, K and V to shared memory.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/sm90/schedule.h"

namespace anymask::cuda {

template <ForwardConfig C>
struct LoadWarp {
  using Shared = ForwardShared<C>;
  // Looking without a pause takes issue slots from the math warps: 3% of a causal pass.
  static constexpr uint32_t kPollNanoseconds = 200;

  const ForwardParams& p;
  Shared& shared;
  const int lane;

  Ring<kItemSlots> items;  // the slot of the next item to publish
  Item next;
  PartList<C> parts{p, shared.starts, lane};
  RowPart next_part{};
  Ring<C.k_stages> k_ring;
  Ring<C.v_stages> v_ring;
  Item item;
  int first_tile;  // of the row tile's, that the item begins with
  int kv_head;
  uint32_t q_parity = 0;  // a bit per strip
  uint32_t q_wanted = 0;  // strips whose Q of this item is still to be loaded

  // A warpgroup's 64 rows of Q.
  __device__ __forceinline__ void load_rows(int w) {
    int column = 0;
    for (auto& slab : shared.q[w]) {
      ptx::load_box(slab, &p.q, shared.q_full[w], column, item.row_tile * C.rows() + 64 * w,
                    item.head, item.batch);
      column += kSlabColumns;
    }
  }

  // A warpgroup frees its Q when its own last Q K^T of the item before is done, and they are done
  // at different times: so Q is loaded whenever one frees it, while this warp waits for others.
  __device__ __forceinline__ void load_freed_q() {
#pragma unroll 1
    for (int w = 0; w < C.strips(); ++w) {
      if (((q_wanted >> w) & 1) == 0) continue;
      if (!shared.q_empty[w].test(((q_parity >> w) & 1) ^ 1)) continue;
      q_wanted ^= 1u << w;
      q_parity ^= 1u << w;
      if (ptx::elect_one()) {
        shared.q_full[w].arrive_expect(Shared::kRowBytes);
        load_rows(w);
      }
    }
  }

  __device__ __forceinline__ void wait(const ptx::Barrier& barrier, uint32_t parity) {
    while (q_wanted != 0) {
      load_freed_q();
      if (barrier.wait_for(parity, kPollNanoseconds)) return;
    }
    barrier.wait(parity);
  }

  // K or V of a tile: slabs of 64 columns.
  template <typename Stage>
  __device__ __forceinline__ void load_stage(Stage& stage, const TensorMapBytes& map,
                                             ptx::Barrier& full, int tile) {
    int column = 0;
    for (auto& slab : stage) {
      ptx::load_box(slab, &map, full, column, tile * C.columns, kv_head, item.batch);
      column += kSlabColumns;
    }
  }

  __device__ __forceinline__ void load_k(int tile, bool partial) {
    wait(shared.k_empty[k_ring.slot], k_ring.parity ^ 1);
    if (ptx::elect_one()) {
      shared.partial[k_ring.slot] = C.has(kBias) ? 2 * tile + partial : partial;
      shared.k_full[k_ring.slot].arrive_expect(Shared::kKBytes);
      load_stage(shared.k[k_ring.slot], p.k, shared.k_full[k_ring.slot], tile);
    }
    k_ring.next();
  }

  __device__ __forceinline__ void load_v(int tile) {
    wait(shared.v_empty[v_ring.slot], v_ring.parity ^ 1);
    if (ptx::elect_one()) {
      shared.v_full[v_ring.slot].arrive_expect(Shared::kVBytes);
      load_stage(shared.v[v_ring.slot], p.v, shared.v_full[v_ring.slot], tile);
    }
    v_ring.next();
  }

  // Loads `item`, and publishes the item after it: before this warp waits for room for the last
  // tile, since mask bits take longer to make than the rings hold. `claimed`: in lane 0, that
  // item's number, counted from the first that the counter gave out.
  __device__ __forceinline__ void load_item(int claimed) {
    const int tiles = item.count;
    if (tiles > 0) {
#pragma unroll
      for (int w = 0; w < C.strips(); ++w) {
        if (item.row_tile * C.rows() + 64 * w < p.q_len) q_wanted |= 1u << w;
      }
    }
    // K runs one tile ahead of V: its stage frees first, and it is wanted first.
    int tile = 0, tile_before = 0;
    TileWalker<C> walker(p, item, mask_place(p, item.batch, item.head), first_tile);
    const int publish_at = tiles > 1 ? tiles - 2 : 0;
#pragma unroll 1
    for (int i = 0; i <= tiles; ++i) {
      if (i < tiles) {
        walker.next();
        tile = ptx::uniform(walker.tile);
        load_k(tile, walker.is_partial);
      }
      if (i > 0) load_v(tile_before);
      tile_before = tile;
      if (i == publish_at) publish(p.blocks + __shfl_sync(0xffffffffu, claimed, 0));
    }
    while (q_wanted != 0) load_freed_q();
  }

  // Makes `next` the item at `index` and tells the other warps.
  __device__ __forceinline__ void publish(int index) {
    next = {0, 0, 0, -1};
    next_part = {0, 0, 1, 0, 0};
    if (C.cuts != 0 && p.parts != nullptr) {
      next = parts.next(next_part);
    } else if (index < p.items) {
      next = item_at<C>(p, index);
    }
    shared.item_empty[items.slot].wait(items.parity ^ 1);
    if (lane == 0) {
      shared.items[items.slot] = next;
      if constexpr (C.cuts != 0) shared.parts[items.slot] = next_part;
      if ((C.masks() == MaskPath::kRuns || C.masks() == MaskPath::kRecipe) && next.count > 0) {
        shared.arrays[items.slot] =
            recipe_arrays<C.masks()>(p, mask_place(p, next.batch, next.head));
      }
      shared.item_full[items.slot].arrive();
    }
    items.next();
  }

  __device__ __forceinline__ void run() {
    // Before the first item comes one without tiles, which only publishes.
    next = {0, 0, 0, 0};
    if (C.cuts != 0 && p.parts != nullptr) parts.begin();
    int claimed = static_cast<int>(blockIdx.x) - p.blocks;
    do {
      // Uniform, so that the copies' coordinates are: else each sits in a loop over the lanes, and
      // a stage that came free waits for it.
      item = {ptx::uniform(next.row_tile), ptx::uniform(next.batch), ptx::uniform(next.head),
              ptx::uniform(next.count)};
      first_tile = C.cuts != 0 ? ptx::uniform(next_part.first_tile) : 0;
      kv_head = item.head / p.group_heads;
      load_item(claimed);
      claimed = 0;
      if (lane == 0 && next.count >= 0 && p.next_item != nullptr) {
        claimed = atomicAdd(p.next_item, 1);
      }
    } while (ptx::uniform(next.count) >= 0);
  }
};

}  // namespace anymask::cuda
