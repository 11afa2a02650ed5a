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
#include "cuda/device/sm90/backward_produce.h"
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

  Ring<C.q_stages> q_ring;
  Ring<C.o_stages> o_ring;
  Ring<C.bit_slots> bit_ring;
  uint32_t kv_parity = 0;
  uint32_t slopes_parity = 1;  // of slopes_empty
  uint32_t q_grad_parity = 1;  // of q_grad_empty
  float k_grad[C.depth / 2];
  float v_grad[C.value_depth / 2];
  float scores[kPieceValues];       // S, then P
  float other[kPieceValues];        // dP, then dQ
  uint32_t weights[kPieceValues / 2];  // P, packed as the A operand of dV
  uint32_t slopes[kPieceValues / 2];   // dS, of dK

  // One arrival a warp.
  __device__ __forceinline__ void arrive(ptx::Barrier& barrier) {
    __syncwarp();
    if (lane == 0) barrier.arrive();
  }

  // ---- products ----

  // One 64 x 64 piece of keys x queries: S = K Q^T, dP = V dO^T.
  template <int kDepth>
  __device__ __forceinline__ void issue_piece(float (&to)[kPieceValues], const void* keys,
                                              const void* queries) {
    const uint32_t a = ptx::lower_k_major(keys) + w * (64 * kSlabRowBytes / 16);
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

  __device__ __forceinline__ void issue_v_grad(int stage, bool started) {
    const uint32_t b = ptx::lower_mn_major(shared.out_grad[stage], kRowSlabBytes);
    ptx::pin(weights);
    ptx::pin(v_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      ValueProduct::product_rs(v_grad, &weights[4 * i], ptx::descriptor(b + i * kSlabRowBytes),
                               started || i > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_k_grad(int stage, bool started) {
    const uint32_t b = ptx::lower_mn_major(shared.q[stage], kRowSlabBytes);
    ptx::pin(k_grad);
    if constexpr (C.slope_operand == 0) ptx::pin(slopes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBackwardRows / 16; ++i) {
      if constexpr (C.slope_operand == 0) {
        KeyProduct::product_rs(k_grad, &slopes[4 * i], ptx::descriptor(b + i * kSlabRowBytes),
                               started || i > 0);
      } else {
        const uint32_t a =
            ptx::lower_k_major(shared.slopes) + (w * 64 * kSlabRowBytes + i * 32) / 16;
        KeyProductShared::run(k_grad, ptx::descriptor(a),
                              ptx::descriptor(b + i * kSlabRowBytes), started || i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // This warpgroup's part of the depth, over all 128 keys.
  __device__ __forceinline__ void issue_q_grad() {
    constexpr int kParts = kSlabColumns / C.part_depth();  // parts of a slab: 1, or 2 at D = 64
    const uint32_t a = ptx::lower_mn_major(shared.slopes, kKeySlabBytes);
    const uint32_t b = ptx::lower_mn_major(shared.k[w / kParts], kKeySlabBytes) +
                       (w % kParts) * (C.part_depth() * 2 / 16);
    ptx::pin(other);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shared::kColumns / 16; ++i) {
      QueryProduct::run(other, ptx::descriptor(a + i * kSlabRowBytes),
                        ptx::descriptor(b + i * kSlabRowBytes), i > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- between the products ----

  __device__ __forceinline__ BackwardStep read_step(int stage) {
    const BackwardStep& step = shared.steps[stage];
    return {ptx::uniform(step.row_tile), ptx::uniform(step.partial),
            C.ordered != 0 && C.staged == 0 ? ptx::uniform(step.turn) : step.turn, 0};
  }

  __device__ __forceinline__ void make_weights(const BackwardStep& step, int stage) {
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

  __device__ __forceinline__ void make_slopes(int stage) {
    pack_slopes<kHalf>(other, shared.stats[stage][1], lane % 4, [&](int i) { return scores[i]; },
                       slopes);
  }

  // dS to shared memory, where both warpgroups read all of it.
  __device__ __forceinline__ void publish_slopes() {
    shared.slopes_empty.wait(slopes_parity);
    slopes_parity ^= 1;
    store_fragments(fragment_address(shared.slopes, 64 * w + 16 * warp, lane), slopes);
    ptx::fence_async_shared();
    ptx::named_sync(kSlopesBarrier, 128 * kBackwardWarpgroups);
  }

  __device__ __forceinline__ void send_q_grad(const BackwardStep& step) {
    const int thread = 32 * warp + lane;
    if constexpr (C.staged != 0) {
      shared.q_grad_empty[w].wait(q_grad_parity);
      q_grad_parity ^= 1;
      float4* to = reinterpret_cast<float4*>(shared.q_grad[w]) + thread;
#pragma unroll
      for (int i = 0; i < kSumValues / 4; ++i) {
        to[128 * i] = {other[4 * i], other[4 * i + 1], other[4 * i + 2], other[4 * i + 3]};
      }
      if (thread == 0) shared.staged_step[w] = step;
      ptx::fence_async_shared();
      arrive(shared.q_grad_full[w]);
    } else {
      float* to = p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
                  w * kBackwardRows * C.part_depth();
      int32_t* turns = p.turns + 2 * static_cast<int64_t>(step.row_tile) + w;
      if constexpr (C.ordered != 0) {
        if (thread == 0) await_turn(turns, step.turn);
        ptx::named_sync(kTurnBarrier + w, 128);
      }
      add_q_grads<kSumValues>(to, thread, other);
      if constexpr (C.ordered != 0) {
        __threadfence();
        ptx::named_sync(kTurnBarrier + w, 128);
        if (thread == 0) ptx::add_release(turns, 1);
      }
    }
  }

  // ---- an item ----

  __device__ __forceinline__ void issue_scores() {
    shared.q_full[q_ring.slot].wait(q_ring.parity);
    issue_piece<C.depth>(scores, shared.k, shared.q[q_ring.slot]);
  }

  __device__ __forceinline__ void issue_weight_grads() {
    shared.out_grad_full[o_ring.slot].wait(o_ring.parity);
    issue_piece<C.value_depth>(other, shared.v, shared.out_grad[o_ring.slot]);
  }

  __device__ __forceinline__ void all_steps(int steps) {
    shared.k_full.wait(kv_parity);
    issue_scores();
    ptx::wgmma_commit();
    shared.v_full.wait(kv_parity);
    kv_parity ^= 1;
    issue_weight_grads();
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);

#pragma unroll 1
    for (int t = 0; t < steps; ++t) {
      const bool more = t + 1 < steps;
      const Ring<C.q_stages> now = q_ring;
      const int before = now.slot == 0 ? C.q_stages - 1 : now.slot - 1;
      const BackwardStep step = read_step(now.slot);
      q_ring.next();

      make_weights(step, now.slot);
      issue_v_grad(o_ring.slot, t > 0);
      ptx::wgmma_wait<1>();  // dP, and dK of the step before
      ptx::pin(other);
      ptx::pin(slopes);
      if (t > 0) arrive(shared.q_empty[before]);
      make_slopes(now.slot);
      ptx::pin(scores);
      if (more) issue_scores();
      ptx::wgmma_commit();

      publish_slopes();
      issue_q_grad();
      issue_k_grad(now.slot, t > 0);
      ptx::wgmma_wait<1>();  // all but dK
      ptx::pin(other);
      ptx::pin(scores);
      ptx::pin(weights);
      arrive(shared.out_grad_empty[o_ring.slot]);
      o_ring.next();
      if constexpr (C.slope_operand == 0) arrive(shared.slopes_empty);
      send_q_grad(step);
      if (more) issue_weight_grads();
      ptx::wgmma_commit();
      if constexpr (C.slope_operand != 0) {
        ptx::wgmma_wait<1>();
        arrive(shared.slopes_empty);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::pin(k_grad);
    ptx::pin(v_grad);
    arrive(shared.q_empty[q_ring.slot == 0 ? C.q_stages - 1 : q_ring.slot - 1]);
    arrive(shared.kv_empty);
  }

  __device__ __forceinline__ void store(const BackwardItem& item) {
    const int first = item.key_tile * C.columns() + 64 * w;
    const int keys = p.kv_len - first;
    uint16_t* to = static_cast<uint16_t*>(p.v_grad) + item.batch * p.v_grad_batch_stride +
                   item.kv_head * p.v_grad_head_stride + first * p.v_grad_row_stride;
    store_rows<kHalf>(v_grad, 1.0f, to, p.v_grad_row_stride, keys, p.value_depth, warp, lane);
    to = static_cast<uint16_t*>(p.k_grad) + item.batch * p.k_grad_batch_stride +
         item.kv_head * p.k_grad_head_stride + first * p.k_grad_row_stride;
    store_rows<kHalf>(k_grad, p.scale, to, p.k_grad_row_stride, keys, p.depth, warp, lane);
  }

  // ---- the story ----

  __device__ __forceinline__ void run() {
    Ring<kItemSlots> items;
#pragma unroll 1
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const BackwardItem& slot = shared.items[items.slot];
      const BackwardItem item = {ptx::uniform(slot.key_tile), ptx::uniform(slot.batch),
                                 ptx::uniform(slot.kv_head), ptx::uniform(slot.steps)};
      arrive(shared.item_empty[items.slot]);
      if (item.steps < 0) break;
      if (item.steps > 0) {
        all_steps(item.steps);
      } else {
#pragma unroll
        for (int i = 0; i < C.depth / 2; ++i) k_grad[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < C.value_depth / 2; ++i) v_grad[i] = 0.0f;
      }
      store(item);
    }
  }
};

}  // namespace anymask::cuda
