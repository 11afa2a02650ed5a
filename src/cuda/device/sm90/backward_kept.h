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

// kPaired: two words at a time, half of the waiting and twice the registers.
template <bool kPaired>
struct KeptPairs {
  rules::Dropout dropout;
  const int32_t* order;  // the caller's keys at positions, or null
  int pair = -1;         // whose these are

  // The words of the keys at positions first .. first + 31, a lane's own to `to`: rows
  // first_row .. first_row + 31 and the 32 after them. The whole warp, converged.
  __device__ __forceinline__ void make(const BackwardParams& p, const KeptRequest& request,
                                       int first_row, int first, int lane, uint32_t (&to)[2]) {
    const int wanted = request.batch * p.q_heads + request.head;
    if (wanted != pair) {
      pair = wanted;
      dropout = dropout_of(p.scores, request.batch, request.head);
      order = key_order(p, {0, request.batch, request.head / p.group_heads, 0});
    }
    const uint32_t row = first_row + lane, block = first / 32;
    if constexpr (kPaired) {
      if (order == nullptr) {
        const WordPair dropped =
            rules::dropped_keys<PairedWords>(dropout, WordPair{row, row + 32}, block);
        to[0] = ~transpose_bits(dropped.a, lane);
        to[1] = ~transpose_bits(dropped.b, lane);
        return;
      }
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const uint32_t half_row = row + 32 * half;
      const uint32_t dropped =
          order != nullptr ? dropped_in_order(dropout, half_row, order, first, p.kv_len)
                           : rules::dropped_keys<rules::ScalarWords>(dropout, half_row, block);
      to[half] = ~transpose_bits(dropped, lane);
    }
  }
};

}  // namespace anymask::cuda
