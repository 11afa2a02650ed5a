// Which variant of the Hopper backward's main kernel serves a call: docs/kernels/backward.md has
// the reasons behind the numbers.
#pragma once

#include "cuda/device/sm90/backward_config.h"

namespace anymask::cuda {

inline constexpr int kBlockSharedBytes = 227 * 1024;

// features: score options, kSoftcap and so on. divides: query heads and segments of rows are to be
// items of their own, where that can be.
BackwardConfig backward_variant(int64_t head_dim, int64_t v_head_dim, bool half, MaskPath masks,
                                int32_t chained, int32_t features = 0, bool divides = false);

// How the main kernel comes by the bits of a column map's partial tiles.
MaskPath backward_masks(const RunRecipe& recipe, const plan::TileMap& columns, bool has_turns,
                        int32_t features);

}  // namespace anymask::cuda
