// Builds plans on the device: tile maps, work orders, packed dense masks. Everything is queued on
// the caller's stream, writes only into the caller's memory and can be captured in a graph.
#pragma once

#include <span>

#include "cuda/kernel.h"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// Fills row maps (outer: row tiles) and column maps (outer: key tiles) of `program`, whose arrays
// are device memory: bitmaps, counts and order. A row map and a column map of the same shape cost
// one classification. Places are the program's batches x heads. At most four maps.
void build_tile_maps(const rules::Program& program, std::span<const plan::TileMap> row_maps,
                     std::span<const plan::TileMap> column_maps, int ordinal, CuStream stream);

// Packs a dense array into the words that a kBits leaf reads, one pass over its elements.
// `words`: data, strides in 32-bit words, column_stride 1. `batches`, `heads`: of the arrays
// themselves, 1 where they are broadcast.
void pack_dense(const rules::Array& dense, const rules::Array& words, int batches, int heads,
                int q_len, int kv_len, int ordinal, CuStream stream);

std::vector<KernelConfig> plan_kernels();

}  // namespace anymask::cuda
