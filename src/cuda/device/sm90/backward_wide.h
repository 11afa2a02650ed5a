// A math warpgroup of the Hopper backward kernel for head dimensions up to 256. dK and dV of 64
// keys are as many registers as two warpgroups have, so each owns half of the depth of the same 64
// keys.
//
// The 64 x 64 piece of a step is shared out by product: warpgroup 0 makes S and P, warpgroup 1 dP
// and dS. Both reach the other through shared memory, where dV, dK and dQ read them. Giving each
// half of both pieces instead would read K and V twice: 192 KB a step for S and dP, not 128 KB.
#pragma once

#include "cuda/device/ptx/wgmma_shared.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_scores.h"
#include "cuda/device/sm90/backward_store.h"
#include "cuda/device/sm90/backward_sums.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct BackwardWide {
  using Shared = BackwardShared<C>;
  static constexpr bool kHalf = C.half != 0;
  static constexpr ptx::Element kElement = kHalf ? ptx::Element::kF16 : ptx::Element::kBf16;
  static constexpr int kPart = C.part_depth();
  static constexpr int kPartSlabs = kPart / kSlabColumns;
  static constexpr int kSlabBytes = 64 * kSlabRowBytes;  // of every operand here
  using ScoreProduct = ptx::Wgmma<kElement, kBackwardRows>;
  using GradProduct = ptx::SharedProduct<kElement, kPart, false>;
  using QueryProduct = ptx::SharedProduct<kElement, kPart, true>;

  const BackwardParams& p;
  Shared& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.q_stages> q_ring;
  Ring<C.o_stages> o_ring;
  Ring<C.bit_slots> bit_ring;
  uint32_t kv_parity = 0;
  uint32_t weights_parity = 1;  // of weights_empty
  int run_slot = -1;            // where the runs of the item's keys are
  // Warpgroup 1 has the logits' gradients. What 0 puts aside is for the same thread of 1.
  ScoreOptionsOfThread<C> options{p, shared, 16 * warp + lane / 4, lane};

  // ---- products ---------------------------------------------------------------------------------

  // Warpgroup 0: S = K Q^T. Warpgroup 1: dP = V dO^T.
  __device__ __forceinline__ void issue_piece(float (&piece)[kPieceValues]) {
    shared.q_full[q_ring.slot].wait(q_ring.parity);
    shared.out_grad_full[o_ring.slot].wait(o_ring.parity);
    const uint32_t a =
        ptx::opaque(w == 0 ? ptx::lower_k_major(shared.k[0]) : ptx::lower_k_major(shared.v));
    const uint32_t b = w == 0 ? ptx::lower_k_major(shared.q[q_ring.slot])
                              : ptx::lower_k_major(shared.out_grad[o_ring.slot]);
    ptx::pin(piece);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C.depth / 16; ++i) {
      const int offset = (i / 4 * kSlabBytes + i % 4 * 32) / 16;
      ScoreProduct::product_ss(piece, ptx::descriptor(a + offset), ptx::descriptor(b + offset),
                               i > 0);
    }
    if constexpr (!C.reads_rows()) {
      add_stats<kHalf>(piece, shared.units[w], (2 - w) * 128, shared.stats[q_ring.slot]);
    } else {  // nothing where math threads come before them: zeros
      const int units = (w == 0 ? C.has(kSoftcap) : C.has(kDropout)) ? 2 : w;
      add_stats<kHalf>(piece, shared.units[units], (2 - units) * 128, shared.stats[q_ring.slot]);
    }
    ptx::wgmma_commit();
  }

  // dV += P^T dO or dK += dS^T Q, this warpgroup's columns.
  __device__ __forceinline__ void issue_grad(float (&grad)[kPart / 2], const void* piece,
                                             const void* rows) {
    const uint32_t a = ptx::lower_k_major(piece);
    const uint32_t b = ptx::lower_mn_major(rows, kSlabBytes) + w * (kPartSlabs * kSlabBytes / 16);
    ptx::pin(grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      GradProduct::run(grad, ptx::descriptor(a + i * 2), ptx::descriptor(b + i * kSlabRowBytes),
                       true);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_q_grad(float (&q_grad)[kPart / 2]) {
    const uint32_t a = ptx::opaque(ptx::lower_mn_major(shared.slopes[0], kSlabBytes));
    const uint32_t b =
        ptx::lower_mn_major(shared.k[0], kSlabBytes) + w * (kPartSlabs * kSlabBytes / 16);
    ptx::pin(q_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C.columns() / 16; ++i) {
      QueryProduct::run(q_grad, ptx::descriptor(a + i * kSlabRowBytes),
                        ptx::descriptor(b + i * kSlabRowBytes), i > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- between the products ---------------------------------------------------------------------

  __device__ __forceinline__ void take_runs() {
    if (run_slot >= 0) shared.bits_empty[run_slot].arrive_warp(lane);
    run_slot = bit_ring.slot;
    shared.bits_full[run_slot].wait(bit_ring.parity);
    bit_ring.next();
  }

  __device__ __forceinline__ void publish_weights(const BackwardStep& step, int stage,
                                                  float (&piece)[kPieceValues]) {
    if constexpr (C.features == 0) {
      weights_from_scores(piece, p.scale_log2);
    } else {
      options.template begin_step<true, false>(stage);
      options.weigh(piece, stage);
      if constexpr (C.has(kDropout)) shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
    }
    if (step.partial != 0) {
      uint32_t words[2][2];
      bool any = true;
      const int key = 16 * warp + lane / 4;
      if constexpr (C.masks() == MaskPath::kRuns) {
        if (step.partial == 2) take_runs();
        words_of_runs(p, shared.runs[run_slot], key, lane % 4, step.first_row, words);
      } else if constexpr (C.has(kDropout)) {
        read_words(shared.bits[bit_ring.slot], key, lane % 4, words);
      } else {
        shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
        read_words(shared.bits[bit_ring.slot], key, lane % 4, words);
        if constexpr (C.baked()) any = any_of(words);
        shared.bits_empty[bit_ring.slot].arrive_warp(lane);
        bit_ring.next();
      }
      if (any) {
        hide(piece, words);
      } else {
        hide_all(piece);
      }
    }
    if constexpr (C.has(kDropout)) {
      options.drop(piece, bit_ring.slot);
      shared.bits_empty[bit_ring.slot].arrive_warp(lane);
      bit_ring.next();
    }
    uint32_t packed[kPieceValues / 2];
#pragma unroll
    for (int i = 0; i < kPieceValues; i += 2) {
      packed[i / 2] = pack_pair<kHalf>(piece[i], piece[i + 1]);
    }
    shared.weights_empty.wait(weights_parity);
    weights_parity ^= 1;
    store_fragments(fragment_address(shared.weights, 16 * warp, lane), packed);
    ptx::fence_async_shared();
  }

  __device__ __forceinline__ void publish_slopes(const float (&piece)[kPieceValues], int stage) {
    uint32_t weights[kPieceValues / 2], slopes[kPieceValues / 2];
    load_fragments(fragment_address(shared.weights, 16 * warp, lane), weights);
    if constexpr (C.features == 0) {
      pack_slopes<kHalf>(
          piece,
          [&](int i) {
            return i % 2 == 0 ? ptx::low_of<kHalf>(weights[i / 2])
                              : ptx::high_of<kHalf>(weights[i / 2]);
          },
          slopes);
    } else {
      options.template begin_step<false, true>(stage);
      if constexpr (C.has(kDropout)) shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
      options.differentiate(piece, weights, stage, bit_ring.slot, slopes);
      if constexpr (C.has(kDropout)) {
        shared.bits_empty[bit_ring.slot].arrive_warp(lane);
        bit_ring.next();
      }
    }
    store_fragments(fragment_address(shared.slopes[0], 16 * warp, lane), slopes);
    ptx::fence_async_shared();
  }

  // ---- an item ----------------------------------------------------------------------------------

  // One row tile; its piece is issued. kMore: on return the next one's is.
  template <bool kMore>
  __device__ __forceinline__ void one_step(const BackwardItem& item, const QuerySums<C>& sums,
                                           float (&piece)[kPieceValues], float (&k_grad)[kPart / 2],
                                           float (&v_grad)[kPart / 2]) {
    const int q_slot = q_ring.slot, o_slot = o_ring.slot;
    const BackwardStep& read = shared.steps[q_slot];
    BackwardStep step = {ptx::uniform(read.row_tile), read.first_row, ptx::uniform(read.partial),
                         read.turn, C.has_turns() ? ptx::uniform(read.last_head + 1) - 1 : -1};
    q_ring.next();
    o_ring.next();

    // Everything: the piece, and dK of the step before. So whoever passes the next barrier no
    // longer reads dS of the step before.
    ptx::wgmma_wait<0>();
    ptx::pin(piece);
    ptx::pin(k_grad);
    ptx::pin(v_grad);
    if (w == 0) publish_weights(step, q_slot, piece);
    ptx::named_sync(kWeightsBarrier, 128 * kBackwardWarpgroups);
    issue_grad(v_grad, shared.weights, shared.out_grad[o_slot]);
    if (w == 1) publish_slopes(piece, q_slot);
    ptx::named_sync(kSlopesBarrier, 128 * kBackwardWarpgroups);

    float q_grad[kPart / 2];
    issue_q_grad(q_grad);
    issue_grad(k_grad, shared.slopes[0], shared.q[q_slot]);
    ptx::wgmma_wait<1>();  // all but dK
    ptx::pin(q_grad);
    if (w == 1) shared.weights_empty.arrive_warp(lane);
    shared.out_grad_empty[o_slot].arrive_warp(lane);
    // Turns and tiles of Q go round together: no registers for another ring.
    static_assert(C.q_stages == kTurnSlots);
    if constexpr (C.has_turns()) {
      shared.turn_full[q_slot].wait(q_ring.parity ^ (q_slot == kTurnSlots - 1 ? 1 : 0));
      step.first_row = read.first_row;  // read again: no register for it from the beginning on
    }
    sums.add(step, item.batch, w, q_grad);
    if constexpr (C.has_turns()) shared.turn_used[q_slot].arrive_warp(lane);
    if constexpr (kMore) {
      issue_piece(piece);
      ptx::wgmma_wait<1>();  // dK
    } else {
      ptx::wgmma_wait<0>();
      ptx::pin(v_grad);
    }
    ptx::pin(k_grad);
    shared.q_empty[q_slot].arrive_warp(lane);
  }

  __device__ __forceinline__ void begin_options() {
    if constexpr (C.has(kSoftcap)) options.slopes.lie_at(shared.aside[0][warp], lane);
    if constexpr (C.has(kDropout)) {
      options.weights.lie_at(shared.aside[C.aside_places() - 1][warp], lane);
    }
  }

  __device__ __forceinline__ void all_steps(const BackwardItem& item, const QuerySums<C>& sums,
                                            float (&k_grad)[kPart / 2],
                                            float (&v_grad)[kPart / 2]) {
    float piece[kPieceValues];  // S, then P; or dP
    shared.k_full[0].wait(kv_parity);
    shared.v_full.wait(kv_parity);
    kv_parity ^= 1;
    issue_piece(piece);
    begin_options();
#pragma unroll 1
    for (int t = 1; t < item.steps; ++t) one_step<true>(item, sums, piece, k_grad, v_grad);
    one_step<false>(item, sums, piece, k_grad, v_grad);
    if (w == 1) options.end_head();
    shared.k_empty[0].arrive_warp(lane);
    shared.v_empty.arrive_warp(lane);
  }

  __device__ __forceinline__ void store(const BackwardItem& item, const float (&k_grad)[kPart / 2],
                                        const float (&v_grad)[kPart / 2]) {
    const int first = item.key_tile * C.columns();
    const int32_t* order = key_order(p, item);
    uint16_t* to = static_cast<uint16_t*>(p.v_grad) + item.batch * p.v_grad_batch_stride +
                   item.kv_head * p.v_grad_head_stride + w * kPart;
    store_rows<kHalf>(v_grad, C.has(kDropout) ? p.scores.keep_scale : 1.0f, to, p.v_grad_row_stride,
                      order, first, p.kv_len, p.value_depth - w * kPart, warp, lane);
    to = static_cast<uint16_t*>(p.k_grad) + item.batch * p.k_grad_batch_stride +
         item.kv_head * p.k_grad_head_stride + w * kPart;
    store_rows<kHalf>(k_grad, p.scale, to, p.k_grad_row_stride, order, first, p.kv_len,
                      p.depth - w * kPart, warp, lane);
  }

  // ---- the story --------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    const QuerySums<C> sums{p, 32 * warp + lane};
    Ring<kItemSlots> items;
#pragma unroll 1
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const BackwardItem& slot = shared.items[items.slot];
      const BackwardItem item = {ptx::uniform(slot.key_tile), ptx::uniform(slot.batch),
                                 ptx::uniform(slot.kv_head), ptx::uniform(slot.steps), 0};
      shared.item_empty[items.slot].arrive_warp(lane);
      if (item.steps < 0) break;
      float k_grad[kPart / 2], v_grad[kPart / 2];
#pragma unroll
      for (int i = 0; i < kPart / 2; ++i) k_grad[i] = v_grad[i] = 0.0f;
      if (item.steps > 0) all_steps(item, sums, k_grad, v_grad);
      store(item, k_grad, v_grad);
    }
  }
};

}  // namespace anymask::cuda
