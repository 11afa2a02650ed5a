// The pairs that dropout keeps, as words of 32 query rows of a key: made by the warps that make
// mask bits, for every tile.
//
// Dropout's pattern comes as 32 keys of a row. So a lane takes a row, and 32 rows of 32 keys are
// then transposed across the warp.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/transpose_bits.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct KeptPairs {
  using Shared = BackwardShared<C>;
  // Both runs of 32 rows at once: half of the waiting, and twice the registers.
  static constexpr bool kPaired = C.load_registers >= 40;

  rules::Dropout dropout;
  const int32_t* order;  // the caller's keys at positions, or null
  int pair = -1;         // whose these are

  // This warp's share of what the request in a slot is about. The whole warp, converged.
  __device__ __forceinline__ void make(const BackwardParams& p, Shared& shared, int slot, int index,
                                       int lane) {
    const KeptRequest& request = shared.kept_requests[slot];
    if (const int wanted = request.batch * p.q_heads + request.head; wanted != pair) {
      pair = wanted;
      dropout = dropout_of(p.scores, request.batch, request.head);
      order = key_order(p, {0, request.batch, request.head / p.group_heads, 0, 0});
    }
    const int first_row = shared.requests[slot].row_tile * kBackwardRows + lane;
    const int first_key = shared.requests[slot].key_tile * C.columns();
    if constexpr (kPaired) {
      if (order == nullptr) {
#pragma unroll 1
        for (int key = 32 * index; key < C.columns(); key += 32 * Shared::kKeyBitWarps) {
          const uint32_t row = first_row, block = (first_key + key) / 32;
          const WordPair dropped =
              rules::dropped_keys<PairedWords>(dropout, WordPair{row, row + 32}, block);
          shared.kept[slot][key + lane][0] = ~transpose_bits(dropped.a, lane);
          shared.kept[slot][key + lane][1] = ~transpose_bits(dropped.b, lane);
        }
        return;
      }
    }
    // 32 rows of 32 keys at a time.
#pragma unroll 1
    for (int part = index; part < C.columns() / 16; part += Shared::kKeyBitWarps) {
      const int key = part / 2 * 32, half = part % 2;
      const int first = first_key + key;
      const uint32_t row = first_row + 32 * half;
      const uint32_t dropped =
          order != nullptr ? dropped_in_order(dropout, row, order, first, p.kv_len)
                           : rules::dropped_keys<rules::ScalarWords>(dropout, row, first / 32);
      shared.kept[slot][key + lane][half] = ~transpose_bits(dropped, lane);
    }
  }
};

}  // namespace anymask::cuda
