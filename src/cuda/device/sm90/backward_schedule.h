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

// The next number of a counter, in lane 0 and on its way: drawn() waits for it.
__device__ __forceinline__ int ask_for_item(int32_t* counter, int lane) {
  int asked = 0;
  if (lane == 0) asked = atomicAdd(counter, 1);
  return asked;
}

// By a converged warp.
__device__ __forceinline__ int drawn(int asked) { return __shfl_sync(0xffffffffu, asked, 0); }

__device__ __forceinline__ int draw_item(int32_t* counter, int lane) {
  return drawn(ask_for_item(counter, lane));
}

// How many query heads an item has.
template <BackwardConfig C>
__device__ __forceinline__ int heads_of_item(const BackwardParams& p) {
  return C.adds_keys != 0 ? 1 : p.group_heads;
}

// How many pairs a chunk has. Chained, a row tile's parts are added about a step apart, so a pair
// begins no more than an item a step: under a mask whose key tiles meet few row tiles more pairs
// than fill L2 have to run side by side to give all blocks work.
//
// In order, so do more where what they read still fits, since fewer blocks of a pair then wait for
// each other: as many as have the rows of one key tile each in a third of L2, within p.most_pairs
// (under causal_document blocks of a pair are at rows far apart). Where all key tiles meet the same
// few row tiles at least so many, so that those who wait for a turn there wait at the same time.
// Not under masks that show half of the tiles: every block is somewhere else in all rows of its
// pair, and hardly anybody waits.
template <BackwardConfig C>
__device__ __forceinline__ int chunk_of(const BackwardParams& p) {
  if (!C.has_turns() || p.columns.total == nullptr) return p.chunk;
  const float total = static_cast<float>(*p.columns.total);
  const float places = static_cast<float>(p.program.batches * p.program.heads);
  const float key_tiles = places * static_cast<float>(p.columns.outer_tiles);
  const float row_tiles = places * static_cast<float>(p.rows.outer_tiles);
  const float steps = fmaxf(total * p.group_heads / key_tiles, 1.0f);
  int wanted = static_cast<int>(p.blocks * (C.columns() / 128.0f) / steps);
  if (C.chained == kOrdered && 2 * total < key_tiles * p.rows.outer_tiles) {
    constexpr float kCrowded = 3.0f;  // times the mean
    const float fullest = static_cast<float>(p.rows.count[p.rows.order[0]]);
    const int fit = static_cast<int>(p.near_tiles / steps);
    const bool crowded = fullest * row_tiles >= kCrowded * total;
    wanted = rules::max_of(
        wanted, crowded ? rules::max_of(fit, p.most_pairs) : rules::min_of(fit, p.most_pairs));
  }
  return rules::min_of(rules::max_of(wanted, p.chunk), p.pairs);
}

// Items in this order: chunks of (batch, kv head) pairs one after the other, so that a chunk's Q,
// dO and dQ stay in L2; inside a chunk the longest key tiles of all its pairs first. With chained
// sums the last key tile comes first instead: under a causal mask a block's first row tile is then
// one that nobody before it adds to, so hardly anything is waited for (with the first key tile
// first, all blocks of a head would have to march at the same row).
//
// chunk: chunk_of<C>(p).
//
// With segments an item meets the row tiles of one: blocks that work side by side are then at rows
// that fit L2, however few row tiles each of them meets.
template <BackwardConfig C>
__device__ __forceinline__ BackwardItem item_at(const BackwardParams& p, int chunk, int index) {
  const int tiles = p.columns.outer_tiles;
  const int tail = C.has_turns() ? p.pairs % chunk : p.tail;
  const int before_tail = p.pairs - tail;  // whole chunks
  const int first_pair = rules::min_of(index / (chunk * tiles) * chunk, before_tail);
  const int pairs = first_pair < before_tail ? chunk : tail;
  const int rest = index - first_pair * tiles;
  const int rank = rest / pairs;
  int pair = first_pair + rest - rank * pairs;
  if constexpr (C.has(kBias)) pair = p.first_pair + pair * p.pair_step;
  BackwardItem item;
  item.first_tile = 0;
  if constexpr (C.adds_keys != 0) {
    const int whole = pair / p.segments;
    item.first_tile = (pair - whole * p.segments) * p.segment_tiles;
    pair = whole;
    item.batch = pair / p.q_heads;
    item.first_head = pair - item.batch * p.q_heads;
    item.kv_head = item.first_head / p.group_heads;
  } else {
    item.batch = pair / p.kv_heads;
    item.kv_head = pair - item.batch * p.kv_heads;
    // As in the forward pass, unless launches have a batch entry each.
    if (C.has(kBias) && p.scores.bias.batch_stride == 0 && p.pairs == p.batch * p.kv_heads) {
      item.kv_head = pair / p.batch;
      item.batch = pair - item.kv_head * p.batch;
    }
    item.first_head = item.kv_head * p.group_heads;
  }
  if constexpr (C.has_turns()) {
    item.key_tile = tiles - 1 - rank;
  } else {
    item.key_tile =
        p.columns.order[map_row(p, p.columns, mask_place(p, item.batch, item.first_head), rank)];
  }
  item.steps = 0;
  if (C.adds_keys != 0 && p.segments > 1) {
    const int64_t row =
        map_row(p, p.columns, mask_place(p, item.batch, item.first_head), item.key_tile);
    const int end = rules::min_of(item.first_tile + p.segment_tiles, p.row_tiles);
    for (int word = item.first_tile / 32; 32 * word < end; ++word) {
      item.steps += __popc(p.columns.visible[row * p.columns.words + word] &
                           rules::run_word(item.first_tile, end, 32 * word));
    }
    return item;
  }
  for (int i = 0; i < heads_of_item<C>(p); ++i) {
    const rules::Place place = mask_place(p, item.batch, item.first_head + i);
    item.steps += p.columns.count[map_row(p, p.columns, place, item.key_tile)];
  }
  return item;
}

// Where query heads are items of their own and this one meets nothing: the key tiles of a pair that
// meet nothing at all come last (often most of them, where keys are reordered), and the counter
// passes over them together.
__device__ __forceinline__ void pass_over(const BackwardParams& p, const BackwardItem& item,
                                          int index, int lane) {
  const int tiles = p.columns.outer_tiles;
  const rules::Place place = mask_place(p, item.batch, item.first_head);
  if (p.columns.count[map_row(p, p.columns, place, item.key_tile)] > 0) return;
  if (lane == 0) atomicMax(p.next_item, (index / tiles + 1) * tiles - p.blocks);
}

// A row tile that an item's key tile meets.
struct RowTile {
  int tile;
  uint32_t partial;
  int turn;   // chained: how many key tiles come before this one among those that it really meets,
  bool last;  // and whether none comes after
};

// Chained: a lane's own row tile.
__device__ __forceinline__ void find_turn(const BackwardParams& p, rules::Place place, int key_tile,
                                          RowTile& mine) {
  const plan::TileMap& map = p.rows;
  const int64_t row = map_row(p, map, place, mine.tile);
  const uint32_t* visible = map.visible + row * map.words;
  int word = key_tile / 32;
  mine.turn = __popc(visible[word] & ~rules::low_bits(key_tile % 32 + 1));
  while (++word < map.words) mine.turn += __popc(visible[word]);
  mine.last = mine.turn + 1 == map.count[row];
}

struct Span {
  int begin, end;
};

// Calls visit(row tile) for the row tiles of `span` that the item's key tile meets under the head
// with that mask place, in ascending order, with the whole warp converged.
template <BackwardConfig C, typename Visit>
__device__ __forceinline__ void for_each_row_tile(const BackwardParams& p, const BackwardItem& item,
                                                  rules::Place place, Span span, int lane,
                                                  Visit&& visit) {
  constexpr unsigned kAll = 0xffffffffu;
  const plan::TileMap& map = p.columns;
  const int64_t row = map_row(p, map, place, item.key_tile);
  const uint32_t* visible = map.visible + row * map.words;
  const uint32_t* hidden = map.hidden + row * map.words;
#pragma unroll 1
  for (int base = span.begin / 32; base < map.words; base += 32) {
    const int index = base + lane;
    const bool inside = index < map.words;
    const uint32_t my_hidden = inside ? hidden[index] : 0;
    uint32_t my_tiles = inside ? visible[index] : 0;
    my_tiles &= rules::run_word(span.begin, span.end, index * 32);
    uint32_t owners = __ballot_sync(kAll, my_tiles != 0);
#pragma unroll 1
    while (owners != 0) {
      const int owner = __ffs(owners) - 1;
      owners &= owners - 1;
      uint32_t tiles = __shfl_sync(kAll, my_tiles, owner);
      const uint32_t partial = __shfl_sync(kAll, my_hidden, owner);
      RowTile mine = {(base + owner) * 32 + lane, 0, 0, false};
      // For 32 row tiles at once: one after the other would cost a trip to memory each.
      if (C.has_turns() && (tiles >> lane & 1) != 0) find_turn(p, place, item.key_tile, mine);
#pragma unroll 1
      while (tiles != 0) {
        const int bit = __ffs(tiles) - 1;
        tiles &= tiles - 1;
        RowTile one = {(base + owner) * 32 + bit, (partial >> bit) & 1, 0, false};
        if constexpr (C.has_turns()) {
          one.turn = __shfl_sync(kAll, mine.turn, bit);
          one.last = __shfl_sync(kAll, static_cast<int>(mine.last), bit) != 0;
        }
        visit(one);
      }
    }
  }
}

}  // namespace anymask::cuda
