// The shared-memory plan of the Hopper forward kernel, and how its rings are walked.
#pragma once

#include "cuda/device/ptx/barrier.h"
#include "cuda/device/sm90/forward_config.h"

namespace anymask::cuda {

// 128-byte rows: the widest swizzle of the copy engine and of wgmma, free of bank conflicts.
inline constexpr int kSlabColumns = 64;
inline constexpr int kSlabRowBytes = 128;

inline constexpr int kMathWarps = 4;  // warps of a warpgroup
inline constexpr int kBitWarps = 3;   // of the producer warpgroup; the fourth loads
inline constexpr int kItemSlots = 3;  // in math, loading, and published ahead

// One row tile of one head. count < 0: no more work.
struct Item {
  int32_t row_tile;
  int32_t batch;
  int32_t head;
  int32_t count;  // visible key tiles
};

// Which part of a row tile an item is, where row tiles are cut.
struct RowPart {
  int32_t row_tile;     // among all of the call
  int32_t first_block;  // that has its first part; the others follow
  int32_t parts;
  int32_t index;
  int32_t first_tile;  // among those that the row tile sees
};

// Where a recipe's arrays begin for an item's mask place; null where there is none. Worked out once
// an item by the loading warp: 64-bit products and a division are too much to do per column.
struct RecipeArrays {
  const int32_t* key_order;
  const int32_t* intervals;
  const void* segments;
  const uint32_t* bits;
  const void* row_ids;
  const void* column_ids;
  int32_t prefix;
};

// The mask bits of a tile, as a plan bakes them (plan/layout.h): [strip][group][row][quad lane], so
// that a warp of math threads reads 32 words in a row.
template <ForwardConfig C>
struct alignas(16) TileBits {
  uint32_t words[C.warpgroups][C.word_groups()][plan::kStripRows][plan::kStripLanes];
  // Of each strip and group, in any of four bytes.
  uint32_t classes[C.warpgroups][C.word_groups()];
};

template <ForwardConfig C>
struct ForwardShared {
  static constexpr int kWarpgroups = C.warpgroups;
  static constexpr int kGroups = C.word_groups();
  // Those of the producer warpgroup that fill the slots of bits: copying them takes one.
  static constexpr int kFillWarps = C.baked() && !C.every_tile() ? 1 : kBitWarps;

  alignas(1024) uint8_t q[C.strips()][C.depth / kSlabColumns][64 * kSlabRowBytes];
  alignas(1024) uint8_t k[C.k_stages][C.depth / kSlabColumns][C.columns * kSlabRowBytes];
  alignas(1024) uint8_t v[C.v_stages][C.value_depth / kSlabColumns][C.columns * kSlabRowBytes];

  TileBits<C> bits[C.bit_slots];
  // The pairs that dropout keeps, laid out likewise.
  alignas(16) uint32_t kept[C.has(kDropout) ? C.bit_slots : 1][C.has(kDropout) ? kWarpgroups : 1]
                           [kGroups][C.has(kDropout) ? 64 : 1][4];
  // Where there are key biases: those of a slot's tile, in the unit of its scores.
  alignas(16) float key_bias[C.bit_slots][C.has(kKeyBias) ? C.columns : 1];

  ptx::Barrier q_full[C.strips()], q_empty[C.strips()];
  ptx::Barrier k_full[C.k_stages], k_empty[C.k_stages];
  ptx::Barrier v_full[C.v_stages], v_empty[C.v_stages];
  ptx::Barrier bits_full[C.bit_slots], bits_empty[C.bit_slots];
  ptx::Barrier item_full[kItemSlots], item_empty[kItemSlots];
  uint32_t partial[C.k_stages];  // bit 0: the tile in this stage needs its bits; above: its index
  Item items[kItemSlots];
  RecipeArrays arrays[kItemSlots];
  // Where row tiles are cut: which part an item is, and where in the line row tiles begin.
  RowPart parts[C.cuts != 0 ? kItemSlots : 1];
  int32_t starts[C.cuts != 0 ? C.most_cut() + 1 : 1];
  // And which of them this block is to join at its end: its first item, its last, both or none.
  int32_t joins;
  Item join_items[C.halves != 0 ? 2 : 1];
  RowPart join_parts[C.halves != 0 ? 2 : 1];
  // The output of one warpgroup's half of the keys, and its rows' state.
  alignas(16) float half[C.halves != 0 ? C.value_depth / 8 + 1 : 1][C.halves != 0 ? 32 : 1][4];

  static_assert(sizeof(TileBits<C>) == plan::row_tile_words(C.tile()) * 4);
  static constexpr int kRowBytes = 64 * C.depth * 2;  // of one warpgroup's rows
  static constexpr int kKBytes = C.columns * C.depth * 2;
  static constexpr int kVBytes = C.columns * C.value_depth * 2;

  __device__ __forceinline__ void init() {
    if constexpr (C.halves != 0) joins = 0;
    for (int strip = 0; strip < C.strips(); ++strip) {
      q_full[strip].init(1);
      q_empty[strip].init(kMathWarps * kWarpgroups / C.strips());
    }
    for (int s = 0; s < C.bit_slots; ++s) {
      bits_full[s].init(C.whole_slots() ? kFillWarps : 4 * kGroups);
      bits_empty[s].init(kMathWarps * kWarpgroups);
    }
    for (int s = 0; s < C.k_stages; ++s) {
      k_full[s].init(1);
      k_empty[s].init(kMathWarps * kWarpgroups);
    }
    for (int s = 0; s < C.v_stages; ++s) {
      v_full[s].init(1);
      v_empty[s].init(kMathWarps * kWarpgroups);
    }
    for (int s = 0; s < kItemSlots; ++s) {
      item_full[s].init(1);
      item_empty[s].init(kMathWarps * kWarpgroups + kFillWarps);
    }
    ptx::fence_barrier_init();
  }
};

// A place in a ring of kSlots and the parity of its current lap.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace anymask::cuda
