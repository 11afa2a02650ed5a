// Which work a block of the backward kernel does: items from a counter, and the visible row tiles
// of an item.
#pragma once

#include "cuda/device/sm90/backward_places.h"
#include "cuda/device/sm90/backward_shared.h"

namespace anymask::cuda {

// Where each position of the item's keys lies in k and v; null: where it says.
__device__ __forceinline__ const int32_t* key_order(const BackwardParams& p,
                                                    const BackwardItem& item) {
  const rules::Program& program = p.program;
  if (program.key_order == nullptr) return nullptr;
  const rules::Place place = mask_place(p, item.batch, item.kv_head * p.group_heads);
  const int64_t row = static_cast<int64_t>(place.batch) * (program.heads / program.order_divisor) +
                      place.head / program.order_divisor;
  return program.key_order + row * program.kv_len;
}

// Items in this order: chunks of (batch, kv head) pairs one after the other, so that a chunk's Q,
// dO and dQ stay in L2; inside a chunk the longest key tiles of all its pairs first. With chained
// sums the last key tile comes first instead: under a causal mask a block's first row tile is then
// one that nobody before it adds to, so hardly anything is waited for (with the first key tile
// first, all blocks of a head would have to march at the same row).
template <BackwardConfig C>
__device__ __forceinline__ BackwardItem item_at(const BackwardParams& p, int index) {
  const int tiles = p.columns.outer_tiles;
  const int chunk = index / (p.chunk * tiles);
  const int first_pair = chunk * p.chunk;
  const int pairs = rules::min_of(p.chunk, p.pairs - first_pair);
  const int rest = index - first_pair * tiles;
  const int rank = rest / pairs;
  const int pair = first_pair + rest - rank * pairs;
  BackwardItem item;
  item.batch = pair / p.kv_heads;
  item.kv_head = pair - item.batch * p.kv_heads;
  const int first_head = item.kv_head * p.group_heads;
  if constexpr (C.chained != 0) {
    item.key_tile = tiles - 1 - rank;
  } else {
    item.key_tile =
        p.columns.order[map_row(p, p.columns, mask_place(p, item.batch, first_head), rank)];
  }
  item.steps = 0;
  for (int i = 0; i < p.group_heads; ++i) {
    const rules::Place place = mask_place(p, item.batch, first_head + i);
    item.steps += p.columns.count[map_row(p, p.columns, place, item.key_tile)];
  }
  return item;
}

// Calls visit(row tile, partial) for the row tiles that the item's key tile meets under `head`, in
// ascending order, with the whole warp converged.
template <typename Visit>
__device__ __forceinline__ void for_each_row_tile(const BackwardParams& p, const BackwardItem& item,
                                                  int head, int lane, Visit&& visit) {
  const plan::TileMap& map = p.columns;
  const int64_t row = map_row(p, map, mask_place(p, item.batch, head), item.key_tile);
  const uint32_t* visible = map.visible + row * map.words;
  const uint32_t* hidden = map.hidden + row * map.words;
#pragma unroll 1
  for (int base = 0; base < map.words; base += 32) {
    const bool inside = base + lane < map.words;
    const uint32_t my_hidden = inside ? hidden[base + lane] : 0;
    const uint32_t my_tiles = inside ? visible[base + lane] : 0;
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

// Chained: how many key tiles come before this one among those that the row tile really meets.
__device__ __forceinline__ int turn_of(const BackwardParams& p, const BackwardItem& item, int head,
                                       int row_tile, int lane) {
  const plan::TileMap& map = p.rows;
  const uint32_t* visible =
      map.visible + map_row(p, map, mask_place(p, item.batch, head), row_tile) * map.words;
  int before = 0;
  for (int word = item.key_tile / 32 + lane; word < map.words; word += 32) {
    const uint32_t mine =
        word == item.key_tile / 32 ? ~rules::low_bits(item.key_tile % 32 + 1) : 0xffffffffu;
    before += __popc(visible[word] & mine);
  }
  return static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(before)));
}

}  // namespace anymask::cuda
