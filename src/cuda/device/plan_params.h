// What the plan's kernels are given: shared by the host that launches them and the device code.
#pragma once

#include "cuda/device/radix_sort_params.h"
#include "plan/layout.h"
#include "rules/key_rows.h"

namespace anymask::cuda {

inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// A block of `classify` answers for 32 row tiles x 8 key tiles: eight words of the column map and a
// byte of each of 32 words of the row map. Its warps first look at spans of 8 row tiles of a key
// tile, then share the tiles of those that are mixed.
inline constexpr int kBlockRowTiles = 32;
inline constexpr int kBlockKeyTiles = 8;
inline constexpr int kSpanTiles = 8;
inline constexpr int kClassifyWarps = 16;
inline constexpr int kClassifyThreads = 32 * kClassifyWarps;

// One tile shape: a row map, a column map or both.
struct ClassifyPass {
  plan::TileShape shape;
  int32_t row_tiles;
  int32_t key_tiles;
  int32_t row_groups;        // of 32 row tiles
  int32_t key_groups;        // of 8 key tiles: enough for whole words of the row map
  int32_t blocks;            // places x row groups x key groups
  int32_t look_at_block;     // 1: at all of a block's tiles at once before anything else
  int32_t look_at_spans;     // 0: straight to the tiles
  plan::TileMap row_map;     // visible == nullptr: not wanted
  plan::TileMap column_map;  // likewise
};

// The shapes of forward and backward run side by side: neither fills the device by itself.
inline constexpr int kMaxPasses = 2;

struct ClassifyParams {
  rules::Program program;
  const int32_t* seen_keys;  // with a key order: of plan::Plan
  ClassifyPass passes[kMaxPasses];
};

// The maps of one plan, counted and ordered together: fewer launches.
inline constexpr int kMaxMaps = 4;
inline constexpr int kOrderWarps = 8;

struct OrderParams {
  plan::TileMap maps[kMaxMaps];
  int32_t map_count;
  int32_t places;
};

// The order of keys: a thread a key to see its rows and to collect it, then blocks that sort and
// halve.
inline constexpr int kSeeThreads = 256;

struct KeyOrderParams {
  rules::Program program;  // dense leaves packed, keys as they come
  int32_t tile_columns;
  int32_t key_blocks;    // blocks of see_keys across kv_len
  int32_t most_groups;   // groups when every key is seen
  uint64_t* items;       // [places][2][kv_len]
  rules::KeyRows* seen;  // [places][kv_len]
  int32_t* block_keys;   // [places][key_blocks]: how many of their keys some row sees
  int32_t* seen_keys;    // [places]: how many of all keys
  int32_t* order;        // [places][kv_len]: position -> key
};

// Bakes the bits of a plan: a warp for each block of each tile.
inline constexpr int kBakeWarps = 4;

struct BakeParams {
  rules::Program program;  // dense leaves packed; key order, if there is one
  plan::TileMap rows;      // the forward's row map
  plan::TileMap columns;   // the backward's column map
  int32_t row_blocks;      // of a tile: a strip and group each
  int32_t column_blocks;   // of a tile: 32 columns each
  int64_t row_tasks;       // blocks of all tiles of all places
  int64_t column_tasks;
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
  int32_t sign_bits;  // 1 for floating point: -0.0 is zero
  int32_t heads;
  int32_t rows;  // 1 when all rows are the same
  int32_t columns;
  int32_t word_rows;      // ceil(rows / 32)
  int32_t column_blocks;  // blocks across the columns
};

}  // namespace anymask::cuda
