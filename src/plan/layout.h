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
};

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
};

}  // namespace anymask::plan
