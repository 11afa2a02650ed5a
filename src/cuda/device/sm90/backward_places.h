// Where a row tile of the workspace is, and a mask place's rows of a tile map.
#pragma once

#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/mask_place.h"

namespace anymask::cuda {

// A row tile of the workspace: which of which head.
struct RowTilePlace {
  int head_index;  // batch * q_heads + head
  int batch;
  int head;
  int tile;

  __device__ __forceinline__ int first_row() const { return tile * kBackwardRows; }
};

__device__ __forceinline__ RowTilePlace place_of(const BackwardParams& p, int64_t row_tile) {
  const int head_index = static_cast<int>(row_tile / p.row_tiles);
  const int batch = head_index / p.q_heads;
  return {head_index, batch, head_index - batch * p.q_heads,
          static_cast<int>(row_tile - int64_t{head_index} * p.row_tiles)};
}

// The row of a tile map's arrays that belongs to an outer tile.
__device__ __forceinline__ int64_t map_row(const BackwardParams& p, const plan::TileMap& map,
                                           rules::Place place, int outer) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * map.outer_tiles +
         outer;
}

}  // namespace anymask::cuda
