// Chained sums: who may add a part to a row tile of dQ. Key tiles take turns, the last one first. A
// thread of its own waits for a step's turn and passes it on when the step's part is there for all
// blocks, so that whoever makes dQ waits for neither trip to memory. (Passed on by those who add,
// and only when they come to the next part, since a fence holds them up for half a step, a turn
// took two steps and more from block to block: under a full mask, where all key tiles of a head
// march through the same rows, blocks then waited a fifth of their time.)
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
  int32_t first;  // of the row tile's parts: others wait for it even where they have no order
};

// One thread of the producer warpgroup. That a part is added it sees through the step's barrier, so
// its release covers what others of the block have added.
template <BackwardConfig C>
struct TurnKeeper {
  const BackwardParams& p;
  BackwardShared<C>& shared;
  Turn before = {0, 0, -1, 0};  // of the step before
  bool adding = false;          // its part is not known to be added
  Turn older = {0, 0, -1, 0};   // kShortSteps: of the step before that,
  bool passing = false;         // whose turn is not passed on
  int owed = 0;  // loose: row tiles in shared.owed whose turns are still to be passed on

  __device__ __forceinline__ void pass_on() {
    if (owed == 0) return;
    ptx::fence_gpu();
    for (int i = 0; i < owed; ++i) ptx::add_relaxed(p.turns + shared.owed[i], 1);
    owed = 0;
  }

  // The step before has added. Loose, only a row tile's last part waits for more than the first, so
  // that a fence, during which nobody of the block adds, can be for several turns.
  __device__ __forceinline__ void note_added() {
    adding = false;
    if (before.row_tile < 0) return;
    if constexpr (C.chained == kOrdered) {
      ptx::add_release(p.turns + before.row_tile, 1);
    } else {
      shared.owed[owed++] = before.row_tile;
      if (before.first != 0 || owed == kOwedTurns) pass_on();
    }
  }

  __device__ __forceinline__ void finish_before() {
    if (!adding) return;
    shared.turn_used[before.slot].wait(before.parity);
    note_added();
  }

  // A step of head dimension 64 is over before this thread has waited for a load and for a fence,
  // one after the other. So its turn is looked up while the part of two steps ago is passed on, and
  // one fence serves both (H100, S = 8192: full 25.5 -> 21.8 ms, causal 12.3 -> 11.5). Longer steps
  // have nothing of it (128: 0 to 2% slower), since a part is passed on a step later.
  static constexpr bool kShortSteps =
      C.chained == kOrdered && C.wide == 0 && C.depth + C.value_depth <= 128;

  __device__ __forceinline__ void pass_on_older() {
    if (!passing) return;
    shared.turn_used[older.slot].wait(older.parity);
    ptx::fence_gpu();
    if (older.row_tile >= 0) ptx::add_relaxed(p.turns + older.row_tile, 1);
    passing = false;
  }

  __device__ __forceinline__ void await_in_short_step(int row_tile, int turn) {
    const int seen = turn > 0 ? ptx::load_relaxed(p.turns + row_tile) : 0;
    const bool fenced = passing;
    pass_on_older();
    if (!fenced || seen < turn) await(row_tile, turn);
  }

  // Until `count` parts are there.
  __device__ __forceinline__ void await(int row_tile, int count) {
    while (count > 0 && ptx::load_acquire(p.turns + row_tile) < count) {
      if (adding && shared.turn_used[before.slot].test(before.parity)) note_added();
      pass_on();
      __nanosleep(20);
    }
  }

  __device__ __forceinline__ void run() {
    Ring<kItemSlots> items;
    Ring<kSentSlots> sent_ring;
    Ring<kTurnSlots> turn_ring;
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const int steps = shared.items[items.slot].steps;
      shared.item_empty[items.slot].arrive();
      if (steps < 0) break;
#pragma unroll 1
      for (int t = 0; t < steps; ++t, sent_ring.next(), turn_ring.next()) {
        shared.sent_full[sent_ring.slot].wait(sent_ring.parity);
        const BackwardStep& step = shared.sent[sent_ring.slot];
        const int row_tile = step.row_tile, turn = step.turn;
        const bool last = step.last_head >= 0;
        if constexpr (kShortSteps) {
          await_in_short_step(row_tile, turn);
        } else {
          await(row_tile, C.chained == kOrdered || last ? turn : rules::min_of(turn, 1));
        }
        shared.turn_full[turn_ring.slot].arrive();
        if constexpr (kShortSteps) {
          older = before;
          passing = adding;
        } else {
          finish_before();
        }
        before = {turn_ring.slot, turn_ring.parity, last ? -1 : row_tile, turn == 0};
        adding = true;
      }
      pass_on_older();
      finish_before();
      pass_on();
    }
  }
};

}  // namespace anymask::cuda
