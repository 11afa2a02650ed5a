// The shared-memory plan of the Hopper backward kernel.
#pragma once

#include "cuda/device/ptx/barrier.h"
#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/forward_shared.h"  // slabs, rings

namespace anymask::cuda {

// One key tile of one kv head: the work between two loads of K and V. steps < 0: no more work.
struct BackwardItem {
  int32_t key_tile;
  int32_t batch;
  int32_t kv_head;
  int32_t steps;       // visible row tiles, over all of the item's query heads
  int32_t first_head;  // of its query heads: the group's, or it alone
  int32_t first_tile;  // of the row tiles that it may meet
};

// One row tile of one query head.
struct BackwardStep {
  int32_t row_tile;   // among all of the workspace: (batch * q_heads + head) * row_tiles + tile
  int32_t first_row;  // of the head's
  int32_t partial;    // 1: its bits are needed, 2: so they are, and under runs asked for just now
  int32_t turn;       // chained: how many key tiles add to its dQ before this one,
  int32_t last_head;  // and the query head where no other follows, else -1
};

// Bits that are to be made: of one row tile and key tile. row_tile < 0: no more work.
struct BitRequest {
  int32_t key_tile;
  int32_t row_tile;
  rules::Place place;
  int32_t fresh;  // the key tile or the place is another than in the request before
};

// Whose scores a step has, where options ask for it.
struct StepPlace {
  static constexpr int kFirstHead = 1, kNextHead = 2;
  int32_t head;
  int32_t batch;
  int32_t key_tile;
  int32_t begins;  // the item's first head, or another one; 0: as the step before
};

// With dropout: the pairs that the request in the same slot is about, and whether it wants mask
// bits too.
struct KeptRequest {
  int32_t batch;
  int32_t head;
  int32_t masked;
};

// The rows that see each key under a recipe: [0] <= row < [1], less [2] <= row < [3], [4] <= row <
// [5].
template <int kKeys>
struct KeyRuns {
  int32_t ends[6][kKeys];
};

// Steps between the loading warp and those who make dQ and see to its turns: the loader is q_stages
// ahead of the math warps, and they are slope_slots ahead of dQ, each give or take one.
inline constexpr int kSentSlots = 8;
inline constexpr int kTurnSlots = 2;  // steps whose turn has come and is not passed on
inline constexpr int kOwedTurns = 8;  // that are passed on together, where they can wait

// Numbered barriers: pairs of warpgroups meet, and one warpgroup by itself.
inline constexpr int kSlopesBarrier = 1;   // wide: dS is in shared memory
inline constexpr int kWeightsBarrier = 2;  // wide: P is
inline constexpr int kTensorBarrier = 3;   // + math warpgroup: its products are next

// The 16-bit pattern of 2^exponent, -14 <= exponent <= 15.
template <bool kHalf>
__device__ __forceinline__ uint16_t power_of_two(int exponent) {
  return static_cast<uint16_t>(kHalf ? (15 + exponent) << 10 : (127 + exponent) << 7);
}

// Constants that pick lse [0] and sums [1] from a row's statistics; [2]: zeros. By thread i of at
// least 192.
template <bool kHalf>
__device__ __forceinline__ void init_units(uint16_t (&units)[3][8][kRowStats], int i,
                                           int lse_exponent) {
  const int kind = i / 64, element = i % kRowStats;
  if (kind > 2) return;
  uint16_t unit = 0;
  if (kind == 0 && element < kLseParts) unit = power_of_two<kHalf>(lse_exponent);
#pragma unroll
  for (int part = 0; part < kSumParts; ++part) {
    if (kind == 1 && element == kLseParts + part) unit = power_of_two<kHalf>(sum_exponent(part));
  }
  units[kind][i / kRowStats % 8][element] = unit;
  ptx::fence_async_shared();
}

template <BackwardConfig C>
struct BackwardShared {
  static_assert(C.q_stages + C.slope_slots + 2 <= kSentSlots);
  static constexpr int kSlabs = C.depth / kSlabColumns;
  static constexpr int kValueSlabs = C.value_depth / kSlabColumns;
  static constexpr int kColumns = C.columns();
  static constexpr int kTileRowBytes = kBackwardRows * kSlabRowBytes;  // a slab of 64 rows

  static constexpr int kGradBytes = C.wide != 0 ? 1 : kGradRows * kSlabRowBytes;

  alignas(1024) uint8_t k[C.k_stages][kSlabs][kColumns * kSlabRowBytes];
  alignas(1024) uint8_t v[kValueSlabs][kColumns * kSlabRowBytes];
  alignas(1024) uint8_t q[C.q_stages][kSlabs][kTileRowBytes];
  alignas(1024) uint8_t out_grad[C.o_stages][kValueSlabs][kTileRowBytes];
  // dS^T: a row of 64 queries per key
  alignas(1024) uint8_t slopes[C.slope_slots][kColumns * kSlabRowBytes];
  // dK and dV on their way out: 16 keys x 64 columns a math warp.
  alignas(1024) uint8_t grads[C.wide != 0 ? 16 : kMathWarps * kBackwardWarpgroups][kGradBytes];
  alignas(1024) uint8_t weights[C.wide != 0 ? kColumns * kSlabRowBytes : 16];  // P^T, wide only

  alignas(128) uint16_t stats[C.q_stages][kBackwardRows][kRowStats];
  alignas(128) uint16_t units[3][8][kRowStats];  // init_units
  // Of a key: two words of bits, a bit a row, as the rules make them and a plan bakes them
  // (plan/layout.h). Or (MaskPath::kRuns) which
  // rows see it, good for as many row tiles as there are; otherwise that is scratch of who makes
  // bits, and a lane reads only what it wrote.
  static constexpr bool kHandsOverRuns = C.masks() == MaskPath::kRuns;
  alignas(16) uint32_t bits[kHandsOverRuns ? 1 : C.bit_slots][kColumns][2];
  KeyRuns<kColumns> runs[kHandsOverRuns ? C.bit_slots : 1];

  ptx::Barrier k_full[C.k_stages], k_empty[C.k_stages], v_full, v_empty;
  ptx::Barrier q_full[C.q_stages], q_empty[C.q_stages];
  ptx::Barrier out_grad_full[C.o_stages], out_grad_empty[C.o_stages];
  ptx::Barrier sent_full[kSentSlots], turn_full[kTurnSlots], turn_used[kTurnSlots];
  ptx::Barrier slopes_full[C.slope_slots], slopes_empty[C.slope_slots], weights_empty;
  ptx::Barrier request_full[C.bit_slots], bits_full[C.bit_slots], bits_empty[C.bit_slots];
  ptx::Barrier item_full[kItemSlots], item_empty[kItemSlots];

  BackwardStep steps[C.q_stages];
  BackwardStep sent[kSentSlots];  // the same again for who makes dQ or sees to turns, later
  BitRequest requests[C.bit_slots];
  BackwardItem items[kItemSlots];
  int32_t chunk;  // chunk_of
  int32_t owed[kOwedTurns];

  // Score options, hardly anything where a variant has none; last, so that nothing else moves.
  static constexpr bool kDrops = C.has(kDropout);
  static constexpr int kAsideBytes = C.aside_places() > 0 ? 16 * 128 : 16;  // of a warp
  static constexpr bool kBiased = C.has(kKeyBias);
  static constexpr bool kPlaced = C.has(kKeyBias | kBias);
  alignas(16) StepPlace step_places[kPlaced ? C.q_stages : 1];
  KeptRequest kept_requests[kDrops ? C.bit_slots : 1];
  alignas(16) float row_numbers[C.reads_rows() ? C.q_stages : 1]
                               [C.reads_rows() ? 2 * kBackwardRows : 4];
  alignas(16) uint32_t kept[kDrops ? C.bit_slots : 1][kDrops ? kColumns : 1][2];  // as bits
  float key_bias[kBiased ? kColumns : 1];  // as exp2 takes them
  // Of each key, where its sum goes (or null), and of each thread that makes slopes its two keys'.
  float* key_sum_places[kBiased ? kColumns : 1];
  float2 key_sums[kBiased ? C.slope_threads() : 1];
  // With kBiasTiles: a step's biases, then their gradients, in pieces of 16 keys a math warp.
  static constexpr int kBiasPieces = C.has(kBiasTiles) ? kColumns / kBiasPieceKeys : 1;
  static constexpr int kBiasPieceBytes =
      C.has(kBiasTiles) ? kBackwardRows * kBiasPieceKeys * 2 : 16;
  alignas(C.has(kBiasTiles) ? 256 : 16)
      uint8_t biases[C.has(kBiasTiles) ? C.q_stages : 1][kBiasPieces][kBiasPieceBytes];
  alignas(16) uint8_t aside[C.aside_places() > 0 ? C.aside_places() : 1]
                           [C.aside_places() > 0 ? kColumns / 16 : 1][kAsideBytes];

  static constexpr int kMathArrivals = kMathWarps * kBackwardWarpgroups;
  // Who reads K and the list of items: the warpgroup that makes dQ too.
  static constexpr int kAllArrivals = kMathArrivals + (C.has_query() ? kMathWarps : 0);
  // Warp 0 of the producer warpgroup loads, the next one sees to turns if there are any, the others
  // make bits.
  static constexpr int kFirstBitWarp = C.has_turns() ? 2 : 1;
  static constexpr int kKeyBitWarps = kMathWarps - kFirstBitWarp;

  static constexpr uint32_t kBitBytes = sizeof(bits[0]);
  static_assert(kBitBytes == 4 * plan::column_tile_words(C.tile()));
  static constexpr uint32_t kKBytes = kColumns * C.depth * 2;
  static constexpr uint32_t kVBytes = kColumns * C.value_depth * 2;
  static constexpr uint32_t kStatBytes = kBackwardRows * kRowStats * 2;
  static constexpr uint32_t kNumberBytes = C.reads_rows() ? 2 * kBackwardRows * 4 : 0;
  static constexpr uint32_t kBiasBytes = C.has(kBiasTiles) ? sizeof(biases[0]) : 0;
  static constexpr uint32_t kQBytes =
      kBackwardRows * C.depth * 2 + kStatBytes + kNumberBytes + kBiasBytes;
  static constexpr uint32_t kOutGradBytes = kBackwardRows * C.value_depth * 2;

  __device__ __forceinline__ void init() {
    for (int s = 0; s < C.k_stages; ++s) {
      k_full[s].init(1);
      k_empty[s].init(kAllArrivals);
    }
    v_full.init(1);
    v_empty.init(kMathArrivals);
    for (int s = 0; s < C.q_stages; ++s) {
      q_full[s].init(1);
      q_empty[s].init(kMathArrivals);
    }
    for (int s = 0; s < C.o_stages; ++s) {
      out_grad_full[s].init(1);
      out_grad_empty[s].init(kMathArrivals);
    }
    for (int s = 0; s < kSentSlots; ++s) sent_full[s].init(1);
    for (int s = 0; s < kTurnSlots; ++s) {
      turn_full[s].init(1);
      turn_used[s].init(C.wide != 0 ? kMathArrivals : kMathWarps);
    }
    for (int s = 0; s < C.slope_slots; ++s) {
      slopes_full[s].init(kMathArrivals);
      slopes_empty[s].init(kMathWarps);
    }
    weights_empty.init(kMathWarps);
    for (int s = 0; s < C.bit_slots; ++s) {
      request_full[s].init(1);
      bits_full[s].init(kDrops ? kKeyBitWarps : C.baked() ? 1 : kColumns / 32);
      bits_empty[s].init(C.wide != 0 && !kDrops ? kMathWarps : kMathArrivals);
    }
    for (int s = 0; s < kItemSlots; ++s) {
      item_full[s].init(1);
      item_empty[s].init(kAllArrivals + (C.has_turns() ? 1 : 0));
    }
    ptx::fence_barrier_init();
  }
};

}  // namespace anymask::cuda
