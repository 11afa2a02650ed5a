#include "cuda/backward_variants.h"

#include <algorithm>

namespace anymask::cuda {
namespace {

// docs/kernels/backward.md has the reasons.
constexpr BackwardConfig variant(int64_t head_dim, int64_t v_head_dim, bool half, MaskPath masks,
                                 int32_t chained, int32_t features, bool divides) {
  BackwardConfig c{};
  c.half = half;
  c.chained = chained;
  c.features = features;
  // With dropout those who make mask bits have something for every tile, and runs would have to be
  // handed over beside it; with biases of pairs math threads have no registers for runs.
  if (c.has(kDropout | kBias) && masks == MaskPath::kRuns) masks = MaskPath::kRecipe;
  c.mask_path = static_cast<int32_t>(masks);
  c.bit_slots = masks == MaskPath::kRuns ? 2 : 4;
  c.slope_slots = 1;
  c.o_stages = 2;
  if (std::max(head_dim, v_head_dim) > 128) {
    c.wide = 1;
    c.depth = c.value_depth = 256;
    c.k_stages = 1;
    c.q_stages = 2;
    c.math_registers = c.has_turns() || features != 0 ? 232 : 224;
    c.load_registers = c.has_turns() || features != 0 ? 40 : 56;
    if (c.has_turns() && c.has(kSoftcap | kDropout)) {
      c.math_registers = 240;
      c.load_registers = 24;
    }
    while (c.shared_bytes() > kBlockSharedBytes && c.bit_slots > 2) --c.bit_slots;
    while (c.shared_bytes() > kBlockSharedBytes && c.o_stages > 1) --c.o_stages;
    return c;
  }
  c.depth = head_dim <= 64 ? 64 : 128;
  c.value_depth = v_head_dim <= 64 ? 64 : 128;
  // A second place for K lets the next item's first product run while dK is being stored.
  c.k_stages = 2;
  c.q_stages = 3;
  // Chained, and with the gradients of a bias of pairs, an item has all query heads of a group;
  // with a softcap there are no registers for the other way.
  c.adds_keys = divides && !c.has_turns() && !c.has(kBias | kSoftcap);
  const int total = c.depth + c.value_depth;
  c.math_registers = total == 256 ? 208 : total == 192 ? 176 : 160;
  c.query_registers = total == 256 ? 64 : total == 192 ? 80 : 96;
  c.load_registers = total == 256 ? 32 : total == 192 ? 80 : 96;
  if (features != 0) {
    c.math_registers = total == 256 ? 208 : total == 192 ? 192 : 184;
    // With 64 the warpgroup of dQ would keep ten accesses to local memory in its loop.
    const bool crowded = c.has_turns() && c.has(kSoftcap) && c.has(kBias);
    c.query_registers = total == 256 && !crowded ? 64 : 72;
    c.load_registers = total == 256 ? (crowded ? 24 : 32) : total == 192 ? 56 : 72;
    if (c.has(kBiasTiles)) {  // biases take the other place of K, and of a tile of Q
      c.k_stages = 1;
      if (total == 256) c.q_stages = 2;
    }
    while (c.shared_bytes() > kBlockSharedBytes && c.bit_slots > 2) --c.bit_slots;
    while (c.shared_bytes() > kBlockSharedBytes && c.q_stages > 2) --c.q_stages;
  }
  return c;
}

constexpr int kDims[] = {64, 128, 256};

constexpr bool variants_fit() {
  for (const int depth : kDims) {
    for (const int value_depth : kDims) {
      for (int32_t option = 0; option < 64; ++option) {
        int32_t features = option / 2 % 16;
        if (option >= 32 && (features & kBias) != 0 && std::max(depth, value_depth) <= 128) {
          features |= kBiasTiles;
        }
        const int32_t chained = option % 2 != 0 ? kOrdered : kUnchained;
        const BackwardConfig c =
            variant(depth, value_depth, false, MaskPath::kRecipe, chained, features, false);
        // What the launch deals out in eights a thread is what the warpgroups can trade.
        const int at_launch = 65536 / c.threads() / 8 * 8 * c.warpgroups();
        if (c.shared_bytes() > kBlockSharedBytes || c.registers() > at_launch) return false;
      }
    }
  }
  return true;
}
static_assert(variants_fit());

}  // namespace

BackwardConfig backward_variant(int64_t head_dim, int64_t v_head_dim, bool half, MaskPath masks,
                                int32_t chained, int32_t features, bool divides) {
  return variant(head_dim, v_head_dim, half, masks, chained, features, divides);
}

MaskPath backward_masks(const RunRecipe& recipe, const plan::TileMap& columns, bool has_turns,
                        int32_t features) {
  const MaskPath masks = mask_path(recipe, columns);
  if (masks != MaskPath::kRecipe) return masks;
  if (recipe.ids >= 0) return ids_by_recipe(has_turns, features) ? masks : MaskPath::kMachine;
  // Runs with holes are handed over too here.
  return recipe.bits < 0 ? MaskPath::kRuns : masks;
}

}  // namespace anymask::cuda
