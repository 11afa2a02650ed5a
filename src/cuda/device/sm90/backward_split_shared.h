// The shared-memory plan of the Hopper backward kernel that makes dQ apart from dK and dV.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_split_params.h"
#include "cuda/device/sm90/forward_shared.h"

namespace anymask::cuda {

// What is made of a tile of 128: dQ of its rows under one query head, or dK and dV of its keys.
enum class SplitWork : int32_t { kNone, kRows, kKeys };

// One of the two. Its steps are 64 keys or 64 rows each.
//
// Which slots these and the tile's own rows and keys lie in is not said: loading warp and math
// warps hand them out alike (SlotQueue), in this order.
//
// kRows: two for the tile's own rows, unless there are no steps. Then one a step, which is free
// again at once, but for the last two if keys_stay. At the end the own rows' are free, unless a bit
// of rows_stay says otherwise.
// kKeys: two for the tile's own keys, unless these stayed. Then the steps: first the own rows that
// stayed, whose slots are free after that; the others as above. At the end the own keys' are free.
struct SplitPhase {
  SplitWork work;  // kNone: no more
  int32_t steps;
  int32_t rows_stay;
  bool keys_stay;
};

// Which tile a phase is about.
struct SplitTile {
  int32_t tile;
  int32_t batch;
  int32_t head;  // kKeys: kv head
};

// Both as they are published. Math threads have no registers to keep the second in.
struct PublishedPhase {
  int32_t phase;  // work, rows_stay, keys_stay, and steps from bit kFlagBits on
  SplitTile tile;

  static constexpr int kFlagBits = 5;

  __device__ __forceinline__ PublishedPhase(const SplitPhase& of, const SplitTile& about)
      : phase(of.steps << kFlagBits | static_cast<int>(of.keys_stay) << 4 | of.rows_stay << 2 |
              static_cast<int>(of.work)),
        tile(about) {}

  __device__ __forceinline__ SplitPhase unpacked() const {
    const int all = ptx::uniform(phase);
    return {static_cast<SplitWork>(all & 3), all >> kFlagBits, (all >> 2) & 3, (all & 16) != 0};
  }
};

// Slots in the order in which they come free.
struct SlotQueue {
  uint32_t slots = 0x543210;  // 4 bits each
  int end = 4 * kSplitSlots;

  __device__ __forceinline__ int take() {
    const int slot = slots & 15;
    slots >>= 4;
    end -= 4;
    return slot;
  }
  __device__ __forceinline__ void put(int slot) {
    slots |= static_cast<uint32_t>(slot) << end;
    end += 4;
  }
};

// What is said of a step, with what is in its slot: a row tile (of rows) and BackwardStep::partial,
// which is of keys that of all 128.
inline constexpr int kPartialBits = 2;

// What is to be made, in the order of steps.
struct SplitRequest {
  SplitWork work;
  Item item;        // kRows: count is not looked at
  BitRequest keys;  // kRows: row_tile is not looked at
};

inline constexpr int kPhaseSlots = 4;
inline constexpr int kRequestSlots = 8;

template <SplitConfig C>
struct SplitShared {
  static constexpr int kSlabs = C.keys().depth / kSlabColumns;
  static constexpr int kValueSlabs = C.keys().value_depth / kSlabColumns;
  static constexpr int kSlabBytes = 64 * kSlabRowBytes;
  static constexpr int kColumns = C.keys().columns();
  static constexpr int kGradBytes = kGradRows * kSlabRowBytes;  // 64 columns at a time

  alignas(1024) uint8_t inner[kSplitSlots][kSlabs][kSlabBytes];               // Q or K
  alignas(1024) uint8_t values[kSplitSlots][kValueSlabs][kSlabBytes];         // dO or V
  alignas(1024) uint8_t grads[kMathWarps * kBackwardWarpgroups][kGradBytes];  // dQ on its way out
  alignas(128) uint16_t stats[kSplitSlots][kBackwardRows][kRowStats];         // of rows
  alignas(128) uint16_t units[3][8][kRowStats];                               // init_units

  // By rows, for dQ. (Named as ForwardShared has them.)
  TileBits<C.rows()> bits[C.rows().bit_slots];
  // By keys, for dK and dV: as BackwardShared has them.
  static constexpr bool kHandsOverRuns = C.keys().masks() == MaskPath::kRuns;
  alignas(16)
      uint32_t key_bits[kHandsOverRuns ? 1 : C.keys().bit_slots][kHandsOverRuns ? 1 : kColumns][2];
  KeyRuns<kColumns> runs[kHandsOverRuns ? C.keys().bit_slots : 1];

  ptx::Barrier slot_full[kSplitSlots], slot_empty[kSplitSlots];
  ptx::Barrier phase_full[kPhaseSlots], phase_empty[kPhaseSlots];
  // All math warps' rows are done with the keys that stay: dK and dV may be put where these are.
  ptx::Barrier keys_read;
  ptx::Barrier request_full[kRequestSlots], request_empty[kRequestSlots];
  ptx::Barrier bits_full[C.rows().bit_slots], bits_empty[C.rows().bit_slots];
  ptx::Barrier key_bits_full[C.keys().bit_slots], key_bits_empty[C.keys().bit_slots];

  PublishedPhase phases[kPhaseSlots];
  int32_t about[kSplitSlots];  // of a step: see kPartialBits
  SplitRequest requests[kRequestSlots];
  RecipeArrays arrays[kBitWarps];  // a bit-making warp's own
  // Of each math warp: rows that see any of its warpgroup's keys lie between these. (Whether a tile
  // shows keys anything is known of all 128.) Not kept in registers: there are none.
  int2 seen[kMathWarps * kBackwardWarpgroups];

  static constexpr int kMathArrivals = kMathWarps * kBackwardWarpgroups;
  static constexpr uint32_t kPairBytes = 64 * (C.keys().depth + C.keys().value_depth) * 2;
  static constexpr uint32_t kStatBytes = kBackwardRows * kRowStats * 2;

  __device__ __forceinline__ void init() {
    for (int s = 0; s < kSplitSlots; ++s) {
      slot_full[s].init(1);
      slot_empty[s].init(kMathArrivals);
    }
    for (int s = 0; s < kPhaseSlots; ++s) {
      phase_full[s].init(1);
      phase_empty[s].init(kMathArrivals);
    }
    keys_read.init(kMathArrivals);
    for (int s = 0; s < kRequestSlots; ++s) {
      request_full[s].init(1);
      request_empty[s].init(kBitWarps);
    }
    for (int s = 0; s < C.rows().bit_slots; ++s) {
      bits_full[s].init(4 * C.rows().word_groups());
      bits_empty[s].init(kMathArrivals);
    }
    for (int s = 0; s < C.keys().bit_slots; ++s) {
      key_bits_full[s].init(kColumns / 32);
      key_bits_empty[s].init(kMathArrivals);
    }
    ptx::fence_barrier_init();
  }
};

}  // namespace anymask::cuda
