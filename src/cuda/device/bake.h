// Bakes the bits of partial tiles, for masks with dense leaves: the attention kernels then copy a
// tile's bits instead of making them. Made by warps beside the products they cost more than the
// products, since a lane waits for every word of a dense leaf: random pairs ran at 74% (forward)
// and 50% (backward) of the full mask's speed. A bit a pair and pass, where the caller has brought
// a byte or more.
#pragma once

#include "cuda/device/plan_params.h"
#include "cuda/device/transpose_bits.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// A tile of a map, counted through places, outer and inner tiles, and what is needed of its place.
struct BakedTile {
  rules::Place place;
  int32_t outer, inner;
  uint32_t* words;  // null: it needs none
};

inline BakedTile baked_tile(const rules::Program& program, const plan::TileMap& map, int64_t tile,
                            int words) {
  const int64_t row = tile / map.inner_tiles;  // of the map's bitmaps
  const int inner = static_cast<int>(tile % map.inner_tiles);
  const int place = static_cast<int>(row / map.outer_tiles);
  const int64_t at = row * map.words + inner / 32;
  const bool partial = (map.visible[at] & map.hidden[at]) >> (inner % 32) & 1u;
  return {{place / program.heads, place % program.heads},
          static_cast<int32_t>(row % map.outer_tiles),
          inner,
          partial ? map.baked + tile * words : nullptr};
}

// The rows [row, row + 32) that see a position; rows and positions that do not exist are hidden.
inline uint32_t word_at(const rules::Program& program, rules::Place place, int position, int row) {
  if (position >= program.kv_len || row >= program.q_len) return 0;
  return rules::column_word(program, place, position, row);
}

// Four of these, and the words are in order.
inline void push(uint4& words, uint32_t next) { words = {words.y, words.z, words.w, next}; }

// A warp bakes a strip of 64 rows x a group of 128 columns; `block`: which one of its tile.
inline void bake_strip(const rules::Program& program, const plan::TileMap& map,
                       const BakedTile& tile, int block) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int groups = plan::groups_of(map.shape);
  const int row = tile.outer * map.shape.rows + block / groups * plan::kStripRows;
  const int first_in_tile = block % groups * plan::kGroupColumns + lane / 2 * 8 + lane % 2;

  uint4 upper{}, lower{};
  uint32_t visible = 0, hidden = 0;  // of any of this lane's columns
  for (int q = 0; q < plan::kStripLanes; ++q) {
    const int in_tile = first_in_tile + 2 * q;
    const bool has_column = in_tile < map.shape.columns;
    const int position = has_column ? tile.inner * map.shape.columns + in_tile : program.kv_len;
    const uint32_t above = word_at(program, tile.place, position, row);
    const uint32_t below = word_at(program, tile.place, position, row + 32);
    visible |= above | below;
    if (has_column) hidden |= ~(above & below);
    push(upper, transpose_bits(above, lane));
    push(lower, transpose_bits(below, lane));
  }
  // Lane r now has row r's words. Before, lanes 0..15 had columns among the group's first 64.
  uint32_t* to = tile.words + block * plan::kStripWords + lane * plan::kStripLanes;
  *reinterpret_cast<uint4*>(to) = upper;
  *reinterpret_cast<uint4*>(to + 32 * plan::kStripLanes) = lower;
  const uint32_t seen = __ballot_sync(0xffffffffu, visible != 0);
  const uint32_t masked = __ballot_sync(0xffffffffu, hidden != 0);
  if (lane == 0) {
    const int blocks = plan::strips_of(map.shape) * groups;
    tile.words[blocks * plan::kStripWords + block] =
        static_cast<uint32_t>((seen & 0xffffu) != 0) | static_cast<uint32_t>(seen >> 16 != 0) << 1 |
        static_cast<uint32_t>((masked & 0xffffu) != 0) << 2 |
        static_cast<uint32_t>(masked >> 16 != 0) << 3;
  }
}

// A warp bakes all rows of 32 columns; `block`: which ones of its tile.
inline void bake_columns(const rules::Program& program, const plan::TileMap& map,
                         const BakedTile& tile, int block) {
  const int in_tile = 32 * block + static_cast<int>(threadIdx.x % 32);
  if (in_tile >= map.shape.columns) return;
  const int words = map.shape.rows / 32;
  for (int i = 0; i < words; ++i) {
    tile.words[in_tile * words + i] =
        word_at(program, tile.place, tile.outer * map.shape.columns + in_tile,
                tile.inner * map.shape.rows + 32 * i);
  }
}

// One warp for each block of each tile, those of the row map first.
inline void bake(const BakeParams& params) {
  int64_t task = int64_t{blockIdx.x} * kBakeWarps + threadIdx.x / 32;
  const bool by_rows = task < params.row_tasks;
  if (!by_rows) task -= params.row_tasks;
  if (!by_rows && task >= params.column_tasks) return;
  const plan::TileMap& map = by_rows ? params.rows : params.columns;
  const int blocks = by_rows ? params.row_blocks : params.column_blocks;
  const int words = by_rows ? plan::row_tile_words(map.shape) : plan::column_tile_words(map.shape);
  const BakedTile tile = baked_tile(params.program, map, task / blocks, words);
  if (tile.words == nullptr) return;
  const int block = static_cast<int>(task % blocks);
  if (by_rows) {
    bake_strip(params.program, map, tile, block);
  } else {
    bake_columns(params.program, map, tile, block);
  }
}

}  // namespace anymask::cuda
