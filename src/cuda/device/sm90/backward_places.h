// Where a mask place's rows of a tile map are.
#pragma once

#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/mask_place.h"

namespace anymask::cuda {

// The row of a tile map's arrays that belongs to an outer tile.
__device__ __forceinline__ int64_t map_row(const BackwardParams& p, const plan::TileMap& map,
                                           rules::Place place, int outer) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * map.outer_tiles +
         outer;
}

}  // namespace anymask::cuda
