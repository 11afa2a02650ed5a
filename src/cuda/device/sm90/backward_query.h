// The warpgroup of the Hopper backward kernel that makes dQ, for head dimensions up to 128: it
// takes the dS that the math warpgroups leave in shared memory, multiplies with K and adds the
// result to the row tile's sums. Adding is slow (256 warp-wide reductions of 128 bytes a step) and
// holds on to the registers it reads, which is why nobody else should have to do it.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/wgmma_shared.h"
#include "cuda/device/sm90/backward_sums.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct BackwardQuery {
  using Shared = BackwardShared<C>;
  static constexpr ptx::Element kElement = C.half != 0 ? ptx::Element::kF16 : ptx::Element::kBf16;
  static constexpr int kKeySlabBytes = Shared::kColumns * kSlabRowBytes;
  static constexpr int kPart = C.part_depth();
  using QueryProduct = ptx::SharedProduct<kElement, kPart, true>;

  const BackwardParams& p;
  Shared& shared;
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.k_stages> k_ring;
  uint32_t done = 0;  // steps; says where every ring is, since registers are few

  __device__ __forceinline__ void issue(float (&q_grad)[kPart / 2], uint32_t a, uint32_t b) {
    ptx::pin(q_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shared::kColumns / 16; ++i) {
      QueryProduct::run(q_grad, ptx::descriptor(a + i * kSlabRowBytes),
                        ptx::descriptor(b + i * kSlabRowBytes), i > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void one_step(const BackwardItem& item, const QuerySums<C>& sums) {
    const int slot = done % C.slope_slots;
    shared.slopes_full[slot].wait(done / C.slope_slots & 1);
    const BackwardStep& sent = shared.sent[done % kSentSlots];
    const BackwardStep step = {ptx::uniform(sent.row_tile),
                               C.has_turns() ? ptx::uniform(sent.first_row) : 0, 0,
                               C.has_turns() ? ptx::uniform(sent.turn) : 0,
                               C.has_turns() ? ptx::uniform(sent.last_head + 1) - 1 : -1};
    const uint32_t a = ptx::lower_mn_major(shared.slopes[slot], kKeySlabBytes);
#pragma unroll 1
    for (int part = 0; part < C.parts(); ++part) {
      float q_grad[kPart / 2];
      issue(q_grad, a, ptx::lower_mn_major(shared.k[k_ring.slot][part], kKeySlabBytes));
      ptx::wgmma_wait<0>();
      ptx::pin(q_grad);
      if (part == C.parts() - 1) shared.slopes_empty[slot].arrive_warp(lane);
      if (C.has_turns() && part == 0) {
        shared.turn_full[done % kTurnSlots].wait(done / kTurnSlots & 1);
      }
      sums.add(step, item.batch, part, q_grad);
    }
    if constexpr (C.has_turns()) shared.turn_used[done % kTurnSlots].arrive_warp(lane);
    ++done;
  }

  __device__ __forceinline__ void run() {
    const QuerySums<C> sums{p, 32 * warp + lane};
    Ring<kItemSlots> items;
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const BackwardItem& slot = shared.items[items.slot];
      const BackwardItem item = {0, ptx::uniform(slot.batch), 0, ptx::uniform(slot.steps), 0};
      shared.item_empty[items.slot].arrive_warp(lane);
      if (item.steps < 0) break;
      if (item.steps == 0) continue;
        // K is there: dS was made with it.
#pragma unroll 1
      for (int t = 0; t < item.steps; ++t) one_step(item, sums);
      shared.k_empty[k_ring.slot].arrive_warp(lane);
      k_ring.next();
    }
  }
};

}  // namespace anymask::cuda
