// What the plan's kernels are given: shared by the host that launches them and the device code.
#pragma once

#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// A block of `classify` answers for 32 row tiles x 8 key tiles: a warp a key tile. So a warp's
// answer is one word of the column map, and the block's one byte for each of 32 rows of the row map.
inline constexpr int kClassifyWarps = 8;
inline constexpr int kClassifyRowTiles = 32;
inline constexpr int kClassifyThreads = 32 * kClassifyWarps;

struct ClassifyParams {
  rules::Program program;
  plan::TileShape shape;
  int32_t row_tiles;
  int32_t key_tiles;
  int32_t row_groups;     // of 32 row tiles
  int32_t key_groups;     // of 8 key tiles: enough for whole words of the row map
  int32_t widest_span;    // row tiles that are asked about at once: 32, or 1
  int32_t look_at_pairs;  // classes may say `some` where the pairs are all alike: look
  plan::TileMap row_map;     // visible == nullptr: not wanted
  plan::TileMap column_map;  // likewise
};

// The maps of one plan, counted and ordered together: fewer launches.
inline constexpr int kMaxMaps = 4;
inline constexpr int kOrderWarps = 8;

struct OrderParams {
  plan::TileMap maps[kMaxMaps];
  int32_t map_count;
  int32_t places;
};

// Packs dense[batch][head][row][column] != 0 into words[batch][head][row / 32][column]. Heads here
// are the arrays' own; head_divisor is not looked at.
inline constexpr int kPackThreads = 128;

struct PackConfig {
  int32_t bytes;  // of a dense element
  bool quads;     // four neighbouring byte-sized columns a thread, read as one word
};

struct PackParams {
  rules::Array dense;
  rules::Array words;
  int32_t sign_bits;      // 1 for floating point: -0.0 is zero
  int32_t heads;
  int32_t rows;           // 1 when all rows are the same
  int32_t columns;
  int32_t word_rows;      // ceil(rows / 32)
  int32_t column_blocks;  // blocks across the columns
};

}  // namespace anymask::cuda
