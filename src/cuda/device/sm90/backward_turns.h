// Chained sums: the parts of a row tile of dQ are added in the order of falling key tiles. A thread
// of its own waits for a step's turn and passes it on when the step's part is there for all blocks,
// so that whoever makes dQ waits for neither trip to memory. (Passed on by those who add, and only
// when they come to the next part, since a fence holds them up for half a step, a turn took two
// steps and more from block to block: under a full mask, where all key tiles of a head march
// through the same rows, blocks then waited a fifth of their time.)
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/backward_shared.h"

namespace anymask::cuda {

// Of one step: its place in the rings, and the row tile whose turn is passed on; -1: nobody comes
// after it.
struct Turn {
  int32_t slot;
  uint32_t parity;
  int32_t row_tile;
};

// One thread of the producer warpgroup. That a part is added it sees through the step's barrier, so
// its release covers what others of the block have added.
template <BackwardConfig C>
__device__ __forceinline__ void run_turns(const BackwardParams& p, BackwardShared<C>& shared) {
  Ring<kItemSlots> items;
  Ring<kSentSlots> sent_ring;
  Ring<kTurnSlots> turn_ring;
  for (;; items.next()) {
    shared.item_full[items.slot].wait(items.parity);
    const int steps = shared.items[items.slot].steps;
    shared.item_empty[items.slot].arrive();
    if (steps < 0) break;
    Turn before = {0, 0, -1};
    bool adding = false;  // the step before
    const auto pass_on = [&] {
      if (before.row_tile >= 0) ptx::add_release(p.turns + before.row_tile, 1);
      adding = false;
    };
    const auto finish_before = [&] {
      if (!adding) return;
      shared.turn_used[before.slot].wait(before.parity);
      pass_on();
    };
#pragma unroll 1
    for (int t = 0; t < steps; ++t, sent_ring.next(), turn_ring.next()) {
      shared.sent_full[sent_ring.slot].wait(sent_ring.parity);
      const BackwardStep& step = shared.sent[sent_ring.slot];
      const int row_tile = step.row_tile, turn = step.turn;
      const bool last = step.last_head >= 0;
      while (turn > 0 && ptx::load_acquire(p.turns + row_tile) < turn) {
        if (adding && shared.turn_used[before.slot].test(before.parity)) {
          pass_on();
        } else {
          __nanosleep(20);
        }
      }
      shared.turn_full[turn_ring.slot].arrive();
      finish_before();
      before = {turn_ring.slot, turn_ring.parity, last ? -1 : row_tile};
      adding = true;
    }
    finish_before();
  }
}

}  // namespace anymask::cuda
