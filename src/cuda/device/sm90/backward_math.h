// A math warpgroup of the Hopper backward kernel for head dimensions up to 128: it owns 64 of the
// block's 128 keys and keeps their dK and dV in registers.
//
// A step is one tile of 64 query rows: P from S; dP and dV; dS from P and dP; dK and the next S.
// dS also goes to shared memory, where a third warpgroup makes dQ of it (backward_query.h). The two
// math warpgroups never wait for each other, so their arithmetic and their products interleave by
// themselves.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/ptx/wgmma_shared.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_key_sums.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_scores.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct BackwardMath {
  using Shared = BackwardShared<C>;
  static constexpr bool kHalf = C.half != 0;
  static constexpr ptx::Element kElement = kHalf ? ptx::Element::kF16 : ptx::Element::kBf16;
  static constexpr int kKeySlabBytes = Shared::kColumns * kSlabRowBytes;
  static constexpr int kRowSlabBytes = Shared::kTileRowBytes;
  using ScoreProduct = ptx::Wgmma<kElement, kBackwardRows>;
  using KeyProduct = ptx::Wgmma<kElement, C.depth>;
  using ValueProduct = ptx::Wgmma<kElement, C.value_depth>;

  const BackwardParams& p;
  Shared& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.k_stages> k_ring;
  Ring<C.q_stages> q_ring;
  Ring<C.o_stages> o_ring;  // unless dO has as many places as Q: then they go round together
  Ring<C.slope_slots> slope_ring;
  Ring<C.bit_slots> bit_ring;
  uint32_t v_parity = 0;  // of v_full
  int run_slot = -1;      // where the runs of the item's keys are
  ScoreOptionsOfThread<C> options{p, shared, 64 * w + 16 * warp + lane / 4, lane};

  // The two math warpgroups issue their products in turns, so that one computes while the other's
  // products run. Left alone they fall into step: the tensor cores serve both alike, and then both
  // compute.
  __device__ __forceinline__ void take_turn() {
    ptx::named_sync(kTensorBarrier + w, 128 * kBackwardWarpgroups);
  }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_arrive(kTensorBarrier + 1 - w, 128 * kBackwardWarpgroups);
  }

  // ---- products ---------------------------------------------------------------------------------

  // One 64 x 64 piece of keys x queries: S = K Q^T - lse / scale, dP = V dO^T - sums.
  template <int kDepth>
  __device__ __forceinline__ void issue_piece(float (&to)[kPieceValues], const void* keys,
                                              const void* queries, int units, int stage) {
    const uint32_t a = ptx::opaque(ptx::lower_k_major(keys) + w * (64 * kSlabRowBytes / 16));
    const uint32_t b = ptx::lower_k_major(queries);
    ptx::pin(to);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      const int slab = i / 4, offset = (i % 4) * 32;
      ScoreProduct::product_ss(to, ptx::descriptor(a + (slab * kKeySlabBytes + offset) / 16),
                               ptx::descriptor(b + (slab * kRowSlabBytes + offset) / 16), i > 0);
    }
    // Where math threads do not come before them.
    if (units == 0 ? !C.has(kSoftcap) : !C.has(kDropout)) {
      add_stats<kHalf>(to, shared.units[units], (2 - units) * 128, shared.stats[stage]);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_v_grad(float (&v_grad)[C.value_depth / 2],
                                               uint32_t (&weights)[kPieceValues / 2], int stage) {
    const uint32_t b = ptx::lower_mn_major(shared.out_grad[stage], kRowSlabBytes);
    ptx::pin(weights);
    ptx::pin(v_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      ValueProduct::product_rs(v_grad, &weights[4 * i], ptx::descriptor(b + i * kSlabRowBytes),
                               true);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_k_grad(float (&k_grad)[C.depth / 2],
                                               uint32_t (&slopes)[kPieceValues / 2], int stage) {
    const uint32_t b = ptx::lower_mn_major(shared.q[stage], kRowSlabBytes);
    ptx::pin(k_grad);
    ptx::pin(slopes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      KeyProduct::product_rs(k_grad, &slopes[4 * i], ptx::descriptor(b + i * kSlabRowBytes), true);
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

  __device__ __forceinline__ void make_weights(int stage, float (&scores)[kPieceValues],
                                               uint32_t (&weights)[kPieceValues / 2]) {
    const BackwardStep& step = shared.steps[stage];
    const int partial = ptx::uniform(step.partial);
    if constexpr (C.features == 0) {
      weights_from_scores(scores, p.scale_log2);
    } else {
      options.template begin_step<true, true>(stage);
      options.weigh(scores, stage);
      if constexpr (C.has(kDropout)) shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
    }
    if (partial != 0) {
      uint32_t words[2][2];
      bool any = true;
      const int key = 64 * w + 16 * warp + lane / 4;
      if constexpr (C.masks() == MaskPath::kRuns) {
        if (partial == 2) take_runs();
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
        hide(scores, words);
      } else {
        hide_all(scores);
      }
    }
    options.drop(scores, bit_ring.slot);
#pragma unroll
    for (int i = 0; i < kPieceValues; i += 2) {
      weights[i / 2] = pack_pair<kHalf>(scores[i], scores[i + 1]);
    }
  }

  // P in float32 would take 32 registers more; it comes back from its packed form.
  __device__ __forceinline__ void make_slopes(const float (&weight_grads)[kPieceValues],
                                              const uint32_t (&weights)[kPieceValues / 2],
                                              int stage, uint32_t (&slopes)[kPieceValues / 2]) {
    if constexpr (C.features != 0) {
      options.differentiate(weight_grads, weights, stage, bit_ring.slot, slopes);
      if constexpr (C.has(kDropout)) {
        shared.bits_empty[bit_ring.slot].arrive_warp(lane);
        bit_ring.next();
      }
      return;
    }
    const auto weight = [&](int i) {
      return i % 2 == 0 ? ptx::low_of<kHalf>(weights[i / 2]) : ptx::high_of<kHalf>(weights[i / 2]);
    };
    pack_slopes<kHalf>(weight_grads, weight, slopes);
  }

  // dS to shared memory, for dQ.
  __device__ __forceinline__ void publish_slopes(const uint32_t (&slopes)[kPieceValues / 2]) {
    shared.slopes_empty[slope_ring.slot].wait(slope_ring.parity ^ 1);
    store_fragments(fragment_address(shared.slopes[slope_ring.slot], 64 * w + 16 * warp, lane),
                    slopes);
    ptx::fence_async_shared();
    shared.slopes_full[slope_ring.slot].arrive_warp(lane);
    slope_ring.next();
  }

  // ---- an item ----------------------------------------------------------------------------------

  // dV, then dK leave in pieces of a warp's 16 keys x 64 columns, through shared memory and the
  // copy engine, which costs a third of what stores from registers do. Pieces take turns at two
  // places: one that is there for them, and the warp's part of dS, once the warpgroup of dQ has
  // read it. (With one place a piece waits until the copy engine has read the one before, behind
  // the next item's loads.) With a softcap there are no registers for what then waits.
  static constexpr bool kTwoPlaces = C.adds_keys == 0 && !C.has(kSoftcap);
  static constexpr int kValuePieces = Shared::kValueSlabs;
  static constexpr int kPieces = kValuePieces + Shared::kSlabs;
  // Of dV, as many as have a place while dK is still running.
  static constexpr int kEarlyPieces = kTwoPlaces ? 1 : kValuePieces;

  // Pieces [kBegin, kEnd) of dV or dK, whose first is kFirst. Keys that have places of their own
  // get their rows straight from registers, all at once.
  template <int kFirst, int kBegin, int kEnd, int kCount>
  __device__ __forceinline__ void store_grad(const BackwardItem& item, const float (&grad)[kCount],
                                             float scale, const TensorMapBytes& map,
                                             uint16_t* direct, int64_t row_stride, int depth) {
    const int first_key = item.key_tile * C.columns() + 64 * w;
    if (const int32_t* order = key_order(p, item)) {
      if constexpr (kBegin == kFirst) {
        store_rows<kHalf>(grad, scale, direct, row_stride, order, first_key, p.kv_len, depth, warp,
                          lane);
      }
      return;
    }
    const int at = kMathWarps * w + warp;
#pragma unroll
    for (int piece = kBegin; piece < kEnd; ++piece) {
      uint8_t* place = shared.grads[at];
      if (kTwoPlaces && piece % 2 != 0) {
        shared.slopes_empty[slope_ring.slot].wait(slope_ring.parity ^ 1);
        place = shared.slopes[slope_ring.slot] + 16 * at * kSlabRowBytes;
      }
      // Before the first, where the item before had no steps, its last may be in the same place.
      constexpr int kPending = kTwoPlaces && kBegin > 0 ? 1 : 0;
      store_piece<kHalf, kPending>(place, map, grad, piece - kFirst, scale, first_key + 16 * warp,
                                   item.kv_head, item.batch, lane);
    }
  }

  template <int kDepth>
  __device__ __forceinline__ float* sums_of(float* sums, const BackwardItem& item) {
    return key_sums_at<kDepth>(p, sums, item.batch, item.kv_head, item.key_tile, w,
                               32 * warp + lane);
  }

  template <int kBegin, int kEnd>
  __device__ __forceinline__ void store_v_grad(const BackwardItem& item,
                                               const float (&v_grad)[C.value_depth / 2]) {
    if constexpr (kBegin == kEnd) return;
    if constexpr (C.adds_keys != 0) {
      add_key_grads<C.value_depth>(sums_of<C.value_depth>(p.v_sums, item), v_grad);
      return;
    }
    uint16_t* to = static_cast<uint16_t*>(p.v_grad) + item.batch * p.v_grad_batch_stride +
                   item.kv_head * p.v_grad_head_stride;
    const float scale = C.has(kDropout) ? p.scores.keep_scale : 1.0f;
    store_grad<0, kBegin, kEnd>(item, v_grad, scale, p.v_grad_map, to, p.v_grad_row_stride,
                                p.value_depth);
  }

  __device__ __forceinline__ void store_k_grad(const BackwardItem& item,
                                               const float (&k_grad)[C.depth / 2]) {
    if constexpr (C.adds_keys != 0) {
      add_key_grads<C.depth>(sums_of<C.depth>(p.k_sums, item), k_grad);
      return;
    }
    uint16_t* to = static_cast<uint16_t*>(p.k_grad) + item.batch * p.k_grad_batch_stride +
                   item.kv_head * p.k_grad_head_stride;
    store_grad<kValuePieces, kValuePieces, kPieces>(item, k_grad, p.scale, p.k_grad_map, to,
                                                    p.k_grad_row_stride, p.depth);
  }

  // What is left of dV, and dK.
  __device__ __forceinline__ void store_rest(const BackwardItem& item,
                                             const float (&v_grad)[C.value_depth / 2],
                                             const float (&k_grad)[C.depth / 2]) {
    store_v_grad<kEarlyPieces, kValuePieces>(item, v_grad);
    store_k_grad(item, k_grad);
  }

  __device__ __forceinline__ void issue_scores(float (&piece)[kPieceValues]) {
    issue_piece<C.depth>(piece, shared.k[k_ring.slot], shared.q[q_ring.slot], 0, q_ring.slot);
  }

  // dV and what it was made of, once its product is done.
  __device__ __forceinline__ void take_v_grad(float (&v_grad)[C.value_depth / 2],
                                              uint32_t (&weights)[kPieceValues / 2], int slot) {
    ptx::pin(weights);
    ptx::pin(v_grad);
    shared.out_grad_empty[slot].arrive_warp(lane);
    if constexpr (C.o_stages != C.q_stages) o_ring.next();
  }

  __device__ __forceinline__ Ring<C.o_stages> out_grad_place() const {
    if constexpr (C.o_stages == C.q_stages) return q_ring;
    return o_ring;
  }

  // One row tile. On entry its S is ready in `piece`; kMore: on return so is that of the next. Else
  // dK is still running.
  template <bool kMore>
  __device__ __forceinline__ void one_step(float (&piece)[kPieceValues],
                                           float (&k_grad)[C.depth / 2],
                                           float (&v_grad)[C.value_depth / 2]) {
    uint32_t weights[kPieceValues / 2];  // P, packed as the A operand of dV
    uint32_t slopes[kPieceValues / 2];   // dS, of dK
    const int now = q_ring.slot;
    const Ring<C.o_stages> o_place = out_grad_place();
    q_ring.next();

    make_weights(now, piece, weights);
    shared.out_grad_full[o_place.slot].wait(o_place.parity);
    take_turn();
    issue_piece<C.value_depth>(piece, shared.v, shared.out_grad[o_place.slot], 1, now);
    issue_v_grad(v_grad, weights, o_place.slot);
    pass_turn();
    // For dV too: with it in flight a thread would need 224 registers instead of the 208 that a
    // warpgroup for dQ leaves.
    ptx::wgmma_wait<0>();
    ptx::pin(piece);
    take_v_grad(v_grad, weights, o_place.slot);
    if constexpr (!kMore) shared.v_empty.arrive_warp(lane);
    if constexpr (kTwoPlaces) {  // pieces of the item before have left from where dS goes
      ptx::bulk_wait_read<0>();
      __syncwarp();
    }
    make_slopes(piece, weights, now, slopes);
    publish_slopes(slopes);
    if constexpr (kMore) shared.q_full[q_ring.slot].wait(q_ring.parity);
    take_turn();
    issue_k_grad(k_grad, slopes, now);
    if constexpr (!kMore) pass_turn();
    if constexpr (kMore) {
      issue_scores(piece);
      pass_turn();
      ptx::wgmma_wait<0>();
      ptx::pin(piece);
      ptx::pin(k_grad);
      ptx::pin(slopes);
      options.end_step();
      shared.q_empty[now].arrive_warp(lane);
    }
  }

  __device__ __forceinline__ void begin_options() {
    if constexpr (C.has(kSoftcap | kDropout) && !C.puts_aside_in_registers()) {
      // Where dK and dV leave; dK of the item before may still be on its way.
      if (lane == 0) ptx::bulk_wait_read<0>();
      __syncwarp();
      const int at = kMathWarps * w + warp;
      options.slopes.lie_at(shared.grads[at], lane);
      if constexpr (C.aside_places() == 0) {
        options.weights.lie_at(shared.grads[at], lane);
      } else {
        options.weights.lie_at(shared.aside[0][at], lane);
      }
    }
  }

  __device__ __forceinline__ void all_steps(const BackwardItem& item, float (&piece)[kPieceValues],
                                            float (&k_grad)[C.depth / 2],
                                            float (&v_grad)[C.value_depth / 2]) {
    begin_options();
    // The last step is a copy of its own: a product issued under an `if` makes the compiler
    // serialise them all (C7514).
#pragma unroll 1
    for (int t = 1; t < item.steps; ++t) one_step<true>(piece, k_grad, v_grad);
    const int last = q_ring.slot;
    one_step<false>(piece, k_grad, v_grad);
    options.end_head();
    shared.k_empty[k_ring.slot].arrive_warp(lane);
    k_ring.next();
    store_v_grad<0, kEarlyPieces>(item, v_grad);
    ptx::wgmma_wait<0>();
    ptx::pin(k_grad);
    options.end_step();
    shared.q_empty[last].arrive_warp(lane);
  }

  // ---- the story --------------------------------------------------------------------------------

  __device__ __forceinline__ BackwardItem take_item(Ring<kItemSlots>& items) {
    shared.item_full[items.slot].wait(items.parity);
    const BackwardItem& slot = shared.items[items.slot];
    const BackwardItem item = {ptx::uniform(slot.key_tile),
                               ptx::uniform(slot.batch),
                               ptx::uniform(slot.kv_head),
                               ptx::uniform(slot.steps),
                               0,
                               0};
    shared.item_empty[items.slot].arrive_warp(lane);
    items.next();
    return item;
  }

  // The first S of an item, issued before dK of the item before is stored. Issued under all
  // circumstances (C7514): where there is no work, from whatever lies there.
  __device__ __forceinline__ void start(const BackwardItem& item, float (&piece)[kPieceValues]) {
    if (item.steps > 0) {
      shared.k_full[k_ring.slot].wait(k_ring.parity);
      shared.q_full[q_ring.slot].wait(q_ring.parity);
      shared.v_full.wait(v_parity);
      v_parity ^= 1;
    }
    take_turn();
    issue_scores(piece);
    pass_turn();
  }

  __device__ __forceinline__ void run() {
    float piece[kPieceValues];  // S, then P; or dP
    if (w == 1) pass_turn();
    Ring<kItemSlots> items;
    BackwardItem item = take_item(items);
    start(item, piece);
#pragma unroll 1
    while (item.steps >= 0) {
      float k_grad[C.depth / 2], v_grad[C.value_depth / 2];
#pragma unroll
      for (int i = 0; i < C.depth / 2; ++i) k_grad[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < C.value_depth / 2; ++i) v_grad[i] = 0.0f;
      ptx::wgmma_wait<0>();
      ptx::pin(piece);
      if (item.steps > 0) {
        all_steps(item, piece, k_grad, v_grad);
      } else {
        store_v_grad<0, kEarlyPieces>(item, v_grad);
      }
      const BackwardItem next = take_item(items);
      // With one place for K the next one is still on its way.
      if constexpr (C.k_stages == 1) store_rest(item, v_grad, k_grad);
      start(next, piece);
      if constexpr (C.k_stages > 1) store_rest(item, v_grad, k_grad);
      item = next;
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::bulk_wait<0>();
  }
};

}  // namespace anymask::cuda
