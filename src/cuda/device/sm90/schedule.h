// Which work a block does: items from a counter, and the visible key tiles of an item.
#pragma once

#include "cuda/device/sm90/forward_config.h"
#include "cuda/device/sm90/forward_shared.h"

namespace anymask::cuda {

__device__ __forceinline__ rules::Place mask_place(const ForwardParams& p, int batch, int head) {
  return {p.program.batches == 1 ? 0 : batch, head / (p.q_heads / p.program.heads)};
}

// The row of the tile map's arrays that belongs to a row tile.
__device__ __forceinline__ int64_t map_row(const ForwardParams& p, rules::Place place,
                                           int row_tile) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * p.map.outer_tiles +
         row_tile;
}

// Items in this order: chunks of (batch, head) pairs one after the other, so that the K and V of a
// chunk stay in L2; inside a chunk the longest row tiles of all its pairs first.
__device__ __forceinline__ Item item_at(const ForwardParams& p, int index) {
  const int rows = p.map.outer_tiles;
  const int chunk = index / (p.chunk * rows);
  const int first_pair = chunk * p.chunk;
  const int pairs = rules::min_of(p.chunk, p.pairs - first_pair);
  const int rest = index - first_pair * rows;
  const int rank = rest / pairs;
  const int pair = first_pair + rest - rank * pairs;
  Item item;
  item.batch = pair / p.q_heads;
  item.head = pair - item.batch * p.q_heads;
  const int64_t first = map_row(p, mask_place(p, item.batch, item.head), 0);
  item.row_tile = p.map.order[first + rank];
  item.count = p.map.count[first + item.row_tile];
  return item;
}

// Calls visit(tile, partial) for the tiles of `item` that a bit of `visible` (kPartialOnly: and of
// `hidden`) marks, in ascending order, with the whole warp converged.
template <bool kPartialOnly, typename Visit>
__device__ __forceinline__ void for_each_tile(const ForwardParams& p, const Item& item, int lane,
                                              Visit&& visit) {
  const int64_t row = map_row(p, mask_place(p, item.batch, item.head), item.row_tile);
  const uint32_t* visible = p.map.visible + row * p.map.words;
  const uint32_t* hidden = p.map.hidden + row * p.map.words;
#pragma unroll 1
  for (int base = 0; base < p.map.words; base += 32) {
    const bool inside = base + lane < p.map.words;
    const uint32_t my_hidden = inside ? hidden[base + lane] : 0;
    uint32_t my_tiles = inside ? visible[base + lane] : 0;
    if (kPartialOnly) my_tiles &= my_hidden;
    uint32_t owners = __ballot_sync(0xffffffffu, my_tiles != 0);
#pragma unroll 1
    while (owners != 0) {
      const int owner = __ffs(owners) - 1;
      owners &= owners - 1;
      uint32_t tiles = __shfl_sync(0xffffffffu, my_tiles, owner);
      const uint32_t partial = __shfl_sync(0xffffffffu, my_hidden, owner);
#pragma unroll 1
      while (tiles != 0) {
        const int bit = __ffs(tiles) - 1;
        tiles &= tiles - 1;
        visit((base + owner) * 32 + bit, (partial >> bit) & 1);
      }
    }
  }
}

}  // namespace anymask::cuda
