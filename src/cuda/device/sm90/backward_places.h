// Which mask place a head belongs to, and where its rows of a tile map are.
#pragma once

#include "cuda/device/sm90/backward_config.h"

namespace anymask::cuda {

__device__ __forceinline__ rules::Place mask_place(const BackwardParams& p, int batch, int head) {
  return {p.program.batches == 1 ? 0 : batch, head / (p.q_heads / p.program.heads)};
}

// The row of a tile map's arrays that belongs to an outer tile.
__device__ __forceinline__ int64_t map_row(const BackwardParams& p, const plan::TileMap& map,
                                           rules::Place place, int outer) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * map.outer_tiles +
         outer;
}

}  // namespace anymask::cuda
