// Builds plans on the device: tile maps, work orders, packed dense masks. Everything is queued on
// the caller's stream, writes only into the caller's memory and can be captured in a graph.
#pragma once

#include <span>

#include "cuda/kernel.h"
#include "plan/view.h"

namespace anymask::cuda {

// Fills all of a plan whose buffer is device memory: packs dense leaves, then builds the maps.
// `lowered` is the mask as it was before plan::view put packed words in place of dense leaves.
void build_plan(const rules::Program& lowered, const plan::Plan& plan, int ordinal,
                CuStream stream);

// Fills row maps (outer: row tiles) and column maps (outer: key tiles) of `program`: bitmaps, counts
// and order. A row map and a column map of the same shape cost one classification. At most
// four maps.
void build_tile_maps(const rules::Program& program, std::span<const plan::TileMap> row_maps,
                     std::span<const plan::TileMap> column_maps, int ordinal, CuStream stream);

// Packs a dense leaf into the words of the kBits leaf that takes its place, one pass over its
// elements.
void pack_dense(const rules::Program& lowered, const rules::Node& dense, const rules::Node& bits,
                int ordinal, CuStream stream);

std::vector<KernelConfig> plan_kernels();

}  // namespace anymask::cuda
