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
    const uint32_t row = first_row + lane;
    WordPair dropped;
    if (order != nullptr) {
      dropped.a = dropped_in_order(dropout, row, order, first, p.kv_len);
      dropped.b = dropped_in_order(dropout, row + 32, order, first, p.kv_len);
    } else if constexpr (kPaired) {
      dropped = rules::dropped_keys<PairedWords>(dropout, WordPair{row, row + 32},
                                                 static_cast<uint32_t>(first / 32));
    } else {
      dropped.a = rules::dropped_keys<rules::ScalarWords>(dropout, row, first / 32);
      dropped.b = rules::dropped_keys<rules::ScalarWords>(dropout, row + 32, first / 32);
    }
    to[0] = ~transpose_bits(dropped.a, lane);
    to[1] = ~transpose_bits(dropped.b, lane);
  }
};

}  // namespace anymask::cuda
