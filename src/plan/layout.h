// Where everything of a plan lies in its one flat buffer: a function of shapes alone, so that the
// size is known without looking at the mask. Plain data: kernels take these structs by value.
#pragma once

#include "rules/common.h"

namespace anymask::plan {

// Rows x columns of the tiles that a pass works on; each backend chooses its own.
struct TileShape {
  int32_t rows;
  int32_t columns;
};

struct TileShapes {
  TileShape forward;
  TileShape backward;
  // 1: plans of masks with dense leaves also have the bits of partial tiles, baked as the kernels
  // read them, where that takes less memory than the leaves. Forward rows: a multiple of
  // kStripRows; backward rows: of 32.
  int32_t bake = 0;
};

// A baked tile of a row map: of each strip of 64 rows and each group of 128 columns, for each row
// the words of four lanes; then for each strip and group a word of classes. Bit c of lane q's word
// is the column that such a lane of a quad holds c-th among the group's: 8 (c / 2) + 2 q + c % 2.
// The classes: bits 0 and 1: something is visible in the group's first or second 64 columns; bits 2
// and 3: something is hidden.
inline constexpr int kStripRows = 64;
inline constexpr int kGroupColumns = 128;
inline constexpr int kStripLanes = 4;
inline constexpr int kStripWords = kStripRows * kStripLanes;  // of a strip and group

constexpr int strips_of(TileShape shape) { return shape.rows / kStripRows; }
constexpr int groups_of(TileShape shape) {
  return (shape.columns + kGroupColumns - 1) / kGroupColumns;
}
// A whole number of the 16 bytes that copies come in.
constexpr int row_tile_words(TileShape shape) {
  const int blocks = strips_of(shape) * groups_of(shape);
  return blocks * kStripWords + (blocks + 3) / 4 * 4;
}

// A baked tile of a column map: for each column the words of its rows, 32 each.
constexpr int column_tile_words(TileShape shape) { return shape.columns * (shape.rows / 32); }

// Two bits a tile, in two bitmaps. For outer tile `o` and inner tile `i` of mask place `p`
// (p = mask batch * mask heads + mask head), bit i % 32 of word [p][o][i / 32].
//   visible 0:            no pair of the tile is allowed, skip it
//   visible 1, hidden 0:  every pair is allowed
//   visible 1, hidden 1:  look at the bits (always so where the tile reaches beyond kv_len)
// In a row map (forward, dq) outer is the row tile and inner the key tile; in a column map (dk, dv)
// the other way round. Bits of inner tiles that do not exist are 0.
struct TileMap {
  TileShape shape;
  int32_t outer_tiles;
  int32_t inner_tiles;
  int32_t words;      // 32-bit words per outer tile: ceil(inner_tiles / 32)
  uint32_t* visible;  // [places][outer_tiles][words]
  uint32_t* hidden;   // [places][outer_tiles][words]
  int32_t* order;     // [places][outer_tiles]: outer tiles by number of visible inner tiles,
                      // most first; ties: the lower index first
  int32_t* count;     // [places][outer_tiles]: visible inner tiles
  int64_t* total;     // [1]: visible tiles of all places, written if there are tiles; null where
                      // nobody asks
  uint32_t* baked;    // [places][outer_tiles][inner_tiles][row_tile_words or column_tile_words],
                      // written where visible and hidden are 1; null: not baked
};

}  // namespace anymask::plan
