// The variants and the parameter of the Hopper backward kernel that makes dQ apart from dK and dV.
// Host and device.
#pragma once

#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/forward_config.h"

namespace anymask::cuda {

// Places in shared memory for 64 rows of Q and dO, or 64 keys of K and V: a tile's own two pairs of
// them, and two more on their way.
inline constexpr int kSplitSlots = 6;

// One variant.
struct SplitConfig {
  int32_t half;         // 1: fp16, 0: bf16
  int32_t depth;        // head dimension of q and k, padded: 64, 128
  int32_t value_depth;  // head dimension of v and out, padded likewise
  int32_t key_masks;    // MaskPaths: of bits by keys, for dK and dV,
  int32_t row_masks;    // and by rows, for dQ
  int32_t key_bit_slots;
  int32_t row_bit_slots;
  int32_t math_registers;
  int32_t load_registers;

  // As those have it who walk row tiles of a key tile, and key tiles of a row tile; neither has
  // rings of tiles.
  constexpr BackwardConfig keys() const {
    BackwardConfig c{};
    c.half = half;
    c.depth = depth;
    c.value_depth = value_depth;
    c.mask_path = key_masks;
    c.bit_slots = key_bit_slots;
    return c;
  }
  constexpr ForwardConfig rows() const {
    ForwardConfig c{};
    c.half = half;
    c.depth = depth;
    c.value_depth = value_depth;
    c.mask_path = row_masks;
    c.bit_slots = row_bit_slots;
    c.warpgroups = kBackwardWarpgroups;
    c.columns = keys().columns();
    c.gradient = 1;
    return c;
  }

  constexpr int threads() const { return 128 * (1 + kBackwardWarpgroups); }
  // Q or K, and dO or V.
  constexpr int slots_bytes() const {
    return kSplitSlots * kBackwardRows * (depth + value_depth) * 2;
  }
  // Blocks of O and dO (row_stats_bytes) that a warp has there, before anything else is there.
  constexpr int stats_stages() const {
    return slots_bytes() / (threads() / 32) / row_stats_bytes(value_depth) >= 4 ? 4 : 2;
  }
  // The slots with their statistics, dQ on its way out, two kinds of bits, and barriers and the
  // like.
  constexpr int shared_bytes() const {
    const bool runs = keys().masks() == MaskPath::kRuns;
    return slots_bytes() + kSplitSlots * kBackwardRows * kRowStats * 2 +
           kBackwardWarpgroups * kBackwardRows * 128 + row_bit_slots * 2064 + 2240 +
           keys().columns() * (runs ? key_bit_slots * 24 : key_bit_slots * 8 + 24);
  }
};

struct SplitParams {
  // Its `pairs`, `chunk`, `tail` and `items` count items of both kinds of work; `blocks` is not
  // looked at.
  BackwardParams keys;
  // What makes mask bits by rows. `q`, `out`, `lse` and what shares out work are not looked at; k
  // and v have boxes of 64 keys, `map` is the plan's row map in the backward's tile shape, and
  // `scale_log2` has the scale's sign.
  ForwardParams rows;
  TensorMapBytes q_grad_map;  // boxes of kGradRows
  int32_t tiles;              // of 128 rows or keys, whatever there are more of
  int32_t stats_blocks;       // that begin with the statistics of rows (backward_split_stats.h),
  int32_t early_row_tiles;    // but for those of so many row tiles, with which all blocks begin
};

}  // namespace anymask::cuda
