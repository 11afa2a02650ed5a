// A math warpgroup of the Hopper backward kernel for head dimensions up to 128: it owns 64 of the
// block's 128 keys and keeps their dK and dV in registers.
//
// A step is one tile of 64 query rows. Products are issued so that the tensor cores always have one
// in their queue while this warpgroup computes:
//   P from S            while dK of the step before and dP run
//   dS from P and dP    while dV runs
//   dQ leaves           while dK runs
#pragma once

#include "cuda/device/ptx/wgmma_shared.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct BackwardMath {
  using Shared = BackwardShared<C>;
  static constexpr bool kHalf = C.half != 0;
  static constexpr ptx::Element kElement = kHalf ? ptx::Element::kF16 : ptx::Element::kBf16;
  static constexpr int kKeySlabBytes = Shared::kColumns * kSlabRowBytes;
  static constexpr int kRowSlabBytes = Shared::kTileRowBytes;
  static constexpr int kSumValues = C.part_depth() / 2;  // of dQ, in a thread
  static constexpr bool kKeepsWeights = C.slope_operand != 0 || C.depth + C.value_depth < 256;
  using ScoreProduct = ptx::Wgmma<kElement, kBackwardRows>;
  using KeyProduct = ptx::Wgmma<kElement, C.depth>;
  using ValueProduct = ptx::Wgmma<kElement, C.value_depth>;
  using KeyProductShared = ptx::SharedProduct<kElement, C.depth, false>;
  using QueryProduct = ptx::SharedProduct<kElement, C.part_depth(), true>;

  const BackwardParams& p;
  Shared& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.k_stages> k_ring;
  Ring<C.q_stages> q_ring;
  Ring<C.o_stages> o_ring;
  Ring<C.bit_slots> bit_ring;
  uint32_t v_parity = 0;       // of v_full
  uint32_t slopes_parity = 1;  // of slopes_empty
  uint32_t q_grad_parity = 1;  // of q_grad_empty

  // One arrival a warp.
  __device__ __forceinline__ void arrive(ptx::Barrier& barrier) {
    __syncwarp();
    if (lane == 0) barrier.arrive();
  }

  // ---- products ---------------------------------------------------------------------------------

  // One 64 x 64 piece of keys x queries: S = K Q^T, dP = V dO^T.
  template <int kDepth>
  __device__ __forceinline__ void issue_piece(float (&to)[kPieceValues], const void* keys,
                                              const void* queries) {
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
    if constexpr (C.slope_operand == 0) ptx::pin(slopes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      if constexpr (C.slope_operand == 0) {
        KeyProduct::product_rs(k_grad, &slopes[4 * i], ptx::descriptor(b + i * kSlabRowBytes),
                               true);
      } else {
        const uint32_t a =
            ptx::lower_k_major(shared.slopes) + (w * 64 * kSlabRowBytes + i * 32) / 16;
        KeyProductShared::run(k_grad, ptx::descriptor(a), ptx::descriptor(b + i * kSlabRowBytes),
                              true);
      }
    }
    ptx::wgmma_commit();
  }

  // This warpgroup's part of the depth, over all 128 keys.
  __device__ __forceinline__ void issue_q_grad(float (&q_grad)[kSumValues]) {
    constexpr int kParts = kSlabColumns / C.part_depth();  // parts of a slab: 1, or 2 at D = 64
    const uint32_t a = ptx::lower_mn_major(shared.slopes, kKeySlabBytes);
    const uint32_t b = ptx::lower_mn_major(shared.k[k_ring.slot][w / kParts], kKeySlabBytes) +
                       (w % kParts) * (C.part_depth() * 2 / 16);
    ptx::pin(q_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shared::kColumns / 16; ++i) {
      QueryProduct::run(q_grad, ptx::descriptor(a + i * kSlabRowBytes),
                        ptx::descriptor(b + i * kSlabRowBytes), i > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- between the products ---------------------------------------------------------------------

  __device__ __forceinline__ BackwardStep read_step(int stage) {
    const BackwardStep& step = shared.steps[stage];
    if constexpr (C.chained == 0) {
      return {ptx::uniform(step.row_tile), ptx::uniform(step.partial), 0, -1};
    }
    return {ptx::uniform(step.row_tile), ptx::uniform(step.partial), ptx::uniform(step.turn),
            static_cast<int32_t>(ptx::uniform(step.last_head + 1)) - 1};
  }

  __device__ __forceinline__ void make_weights(const BackwardStep& step, int stage,
                                               float (&scores)[kPieceValues],
                                               uint32_t (&weights)[kPieceValues / 2]) {
    weights_from_scores(scores, shared.stats[stage][0], p.scale_log2, lane % 4);
    if (step.partial != 0) {
      uint32_t words[2][2];
      shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
      read_words(shared.bits[bit_ring.slot], 64 * w + 16 * warp + lane / 4, lane % 4, words);
      arrive(shared.bits_empty[bit_ring.slot]);
      bit_ring.next();
      hide(scores, words);
    }
#pragma unroll
    for (int i = 0; i < kPieceValues; i += 2) {
      weights[i / 2] = pack_pair<kHalf>(scores[i], scores[i + 1]);
    }
  }

  // Without registers for P in float32 it comes back from its packed form.
  __device__ __forceinline__ void make_slopes(int stage, float (&scores)[kPieceValues],
                                              const float (&weight_grads)[kPieceValues],
                                              const uint32_t (&weights)[kPieceValues / 2],
                                              uint32_t (&slopes)[kPieceValues / 2]) {
    const auto weight = [&](int i) {
      if constexpr (kKeepsWeights) return scores[i];
      return i % 2 == 0 ? ptx::low_of<kHalf>(weights[i / 2]) : ptx::high_of<kHalf>(weights[i / 2]);
    };
    pack_slopes<kHalf>(weight_grads, shared.stats[stage][1], lane % 4, weight, slopes);
  }

  // dS to shared memory, where both warpgroups read all of it.
  __device__ __forceinline__ void publish_slopes(const uint32_t (&slopes)[kPieceValues / 2]) {
    shared.slopes_empty.wait(slopes_parity);
    slopes_parity ^= 1;
    store_fragments(fragment_address(shared.slopes, 64 * w + 16 * warp, lane), slopes);
    ptx::fence_async_shared();
    ptx::named_sync(kSlopesBarrier, 128 * kBackwardWarpgroups);
  }

  __device__ __forceinline__ void send_q_grad(const BackwardStep& step, int batch,
                                              float (&q_grad)[kSumValues]) {
    const int thread = 32 * warp + lane;
    const bool last = C.chained != 0 && step.last_head >= 0;
    if (last) finish_in_turn<C>(p, step, batch, w, thread, q_grad);
    if constexpr (C.staged != 0) {
      shared.q_grad_empty[w].wait(q_grad_parity);
      q_grad_parity ^= 1;
      if (!last) {
        float4* to = reinterpret_cast<float4*>(shared.q_grad[w]) + thread;
#pragma unroll
        for (int i = 0; i < kSumValues / 4; ++i) {
          to[128 * i] = {q_grad[4 * i], q_grad[4 * i + 1], q_grad[4 * i + 2], q_grad[4 * i + 3]};
        }
        ptx::fence_async_shared();
      }
      arrive(shared.q_grad_full[w]);
    } else {
      if (!last) add_in_turn<C>(p, step, w, thread, q_grad);
    }
  }

  // ---- an item ----------------------------------------------------------------------------------

  // dV leaves while the last dQ and dK run; dK when everything is done.
  __device__ __forceinline__ void store_v_grad(const BackwardItem& item,
                                               const float (&v_grad)[C.value_depth / 2]) {
    uint16_t* to = static_cast<uint16_t*>(p.v_grad) + item.batch * p.v_grad_batch_stride +
                   item.kv_head * p.v_grad_head_stride;
    store_rows<kHalf>(v_grad, 1.0f, to, p.v_grad_row_stride, key_order(p, item),
                      item.key_tile * C.columns() + 64 * w, p.kv_len, p.value_depth, warp, lane);
  }

  __device__ __forceinline__ void store_k_grad(const BackwardItem& item,
                                               const float (&k_grad)[C.depth / 2]) {
    uint16_t* to = static_cast<uint16_t*>(p.k_grad) + item.batch * p.k_grad_batch_stride +
                   item.kv_head * p.k_grad_head_stride;
    store_rows<kHalf>(k_grad, p.scale, to, p.k_grad_row_stride, key_order(p, item),
                      item.key_tile * C.columns() + 64 * w, p.kv_len, p.depth, warp, lane);
  }

  // ---- an item ----------------------------------------------------------------------------------

  __device__ __forceinline__ void issue_scores(float (&scores)[kPieceValues]) {
    shared.q_full[q_ring.slot].wait(q_ring.parity);
    issue_piece<C.depth>(scores, shared.k[k_ring.slot], shared.q[q_ring.slot]);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_weight_grads(float (&weight_grads)[kPieceValues]) {
    shared.out_grad_full[o_ring.slot].wait(o_ring.parity);
    issue_piece<C.value_depth>(weight_grads, shared.v, shared.out_grad[o_ring.slot]);
    ptx::wgmma_commit();
  }

  // One row tile. On entry its S is ready and its dP issued; kMore: on return so are those of
  // the next.
  //
  // Some wait has to be for everything, or the compiler loses track of what is in flight from one
  // turn of the loop to the next and serialises all products (C7514): it is the one for dP, behind
  // which nothing is queued but what the other warpgroup has.
  template <bool kMore>
  __device__ __forceinline__ void one_step(const BackwardItem& item, float (&scores)[kPieceValues],
                                           float (&weight_grads)[kPieceValues],
                                           float (&k_grad)[C.depth / 2],
                                           float (&v_grad)[C.value_depth / 2]) {
    uint32_t weights[kPieceValues / 2];  // P, packed as the A operand of dV
    uint32_t slopes[kPieceValues / 2];   // dS, of dK
    const int now = q_ring.slot;
    const BackwardStep step = read_step(now);
    q_ring.next();

    make_weights(step, now, scores, weights);
    ptx::wgmma_wait<0>();  // dP
    ptx::pin(weight_grads);
    if constexpr (!kMore) arrive(shared.v_empty);
    issue_v_grad(v_grad, weights, o_ring.slot);
    make_slopes(now, scores, weight_grads, weights, slopes);
    if constexpr (kMore && C.late_scores == 0) issue_scores(scores);
    publish_slopes(slopes);
    ptx::wgmma_wait<kMore && C.late_scores == 0 ? 1 : 0>();  // dV
    ptx::pin(weights);
    arrive(shared.out_grad_empty[o_ring.slot]);
    o_ring.next();
    float q_grad[kSumValues];
    issue_q_grad(q_grad);
    issue_k_grad(k_grad, slopes, now);
    if constexpr (kMore && C.late_scores != 0) issue_scores(scores);
    ptx::wgmma_wait<kMore && C.late_scores != 0 ? 2 : 1>();  // dQ
    ptx::pin(q_grad);
    if constexpr (C.slope_operand == 0) arrive(shared.slopes_empty);
    send_q_grad(step, item.batch, q_grad);
    if constexpr (kMore) {
      issue_weight_grads(weight_grads);
      ptx::wgmma_wait<1>();  // all but dP
      ptx::pin(scores);
    } else {
      arrive(shared.k_empty[k_ring.slot]);
      ptx::pin(v_grad);
      store_v_grad(item, v_grad);
      ptx::wgmma_wait<0>();
    }
    ptx::pin(k_grad);
    ptx::pin(slopes);
    arrive(shared.q_empty[now]);
    if constexpr (C.slope_operand != 0) arrive(shared.slopes_empty);
  }

  // The first S and dP of an item, issued while dK of the item before is being stored. Issued under
  // all circumstances, see one_step: where there is no work, from whatever lies there.
  __device__ __forceinline__ void start(const BackwardItem& item, float (&scores)[kPieceValues],
                                        float (&weight_grads)[kPieceValues]) {
    if (item.steps > 0) {
      shared.k_full[k_ring.slot].wait(k_ring.parity);
      shared.q_full[q_ring.slot].wait(q_ring.parity);
      shared.v_full.wait(v_parity);
      shared.out_grad_full[o_ring.slot].wait(o_ring.parity);
      v_parity ^= 1;
    }
    issue_piece<C.depth>(scores, shared.k[k_ring.slot], shared.q[q_ring.slot]);
    issue_piece<C.value_depth>(weight_grads, shared.v, shared.out_grad[o_ring.slot]);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void all_steps(const BackwardItem& item, float (&scores)[kPieceValues],
                                            float (&weight_grads)[kPieceValues],
                                            float (&k_grad)[C.depth / 2],
                                            float (&v_grad)[C.value_depth / 2]) {
    // The last step is a copy of its own: a product issued under an `if` makes the compiler
    // serialise them all.
#pragma unroll 1
    for (int t = 1; t < item.steps; ++t) one_step<true>(item, scores, weight_grads, k_grad, v_grad);
    one_step<false>(item, scores, weight_grads, k_grad, v_grad);
    k_ring.next();
  }

  // ---- the story --------------------------------------------------------------------------------

  __device__ __forceinline__ BackwardItem take_item(Ring<kItemSlots>& items) {
    shared.item_full[items.slot].wait(items.parity);
    const BackwardItem& slot = shared.items[items.slot];
    const BackwardItem item = {ptx::uniform(slot.key_tile), ptx::uniform(slot.batch),
                               ptx::uniform(slot.kv_head), ptx::uniform(slot.steps)};
    arrive(shared.item_empty[items.slot]);
    items.next();
    return item;
  }

  __device__ __forceinline__ void run() {
    float scores[kPieceValues];        // S, then P
    float weight_grads[kPieceValues];  // dP
    Ring<kItemSlots> items;
    BackwardItem item = take_item(items);
    start(item, scores, weight_grads);
#pragma unroll 1
    while (item.steps >= 0) {
      float k_grad[C.depth / 2], v_grad[C.value_depth / 2];
#pragma unroll
      for (int i = 0; i < C.depth / 2; ++i) k_grad[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < C.value_depth / 2; ++i) v_grad[i] = 0.0f;
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
      ptx::pin(weight_grads);
      if (item.steps > 0) {
        all_steps(item, scores, weight_grads, k_grad, v_grad);
      } else {
        store_v_grad(item, v_grad);
      }
      const BackwardItem next = take_item(items);
      // With one place for K the next one is still on its way.
      if constexpr (C.k_stages == 1) store_k_grad(item, k_grad);
      start(next, scores, weight_grads);
      if constexpr (C.k_stages > 1) store_k_grad(item, k_grad);
      item = next;
    }
    ptx::wgmma_wait<0>();
  }
};

}  // namespace anymask::cuda
