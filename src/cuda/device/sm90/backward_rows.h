// Blocks of the Hopper backward that make dQ alone (backward_split.h).
//
// They have the forward's roles and loops: a math warpgroup owns 64 query rows, whose S, dP and dQ
// stay in registers while K and V go by.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/wgmma.h"
#include "cuda/device/sm90/backward_split_params.h"
#include "cuda/device/sm90/backward_store.h"
#include "cuda/device/sm90/strip_bits.h"

namespace anymask::cuda {

template <ForwardConfig C>
struct RowPassShared : ForwardShared<C> {
  alignas(1024) uint8_t out_grad[C.warpgroups][C.value_depth / kSlabColumns][64 * kSlabRowBytes];
  static constexpr int kRowBytes = 64 * (C.depth + C.value_depth) * 2;
};

template <ForwardConfig C>
struct RowPassWarp {
  static_assert(C.rows() == C.map_rows() * kBackwardRows && C.blocks() == 2);
  static constexpr bool kHalf = C.half != 0;
  static constexpr auto kElement = kHalf ? ptx::Element::kF16 : ptx::Element::kBf16;
  using QueryProduct = ptx::Wgmma<kElement, C.depth>;

  const RowPassParams& p;
  RowPassShared<C>& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.k_stages> k_ring;
  Ring<C.v_stages> v_ring;
  StripBits<C> bits{shared, w, warp, lane, {}};
  float q_grad[C.depth / 2];
  float lse[2], sum[2];  // of this thread's two rows: see BackwardParams::row_numbers

  // One arrival a warp.
  __device__ __forceinline__ void arrive(ptx::Barrier& barrier) {
    __syncwarp();
    if (lane == 0) barrier.arrive();
  }

  // S = Q K^T or dP = dO V^T of kColumns keys from first_column on.
  template <int kColumns, int kSlabs>
  __device__ __forceinline__ void issue_piece(
      float (&to)[kColumns / 2], const uint8_t (&rows)[kSlabs][64 * kSlabRowBytes],
      const uint8_t (&keys)[kSlabs][C.columns * kSlabRowBytes], int first_column) {
    const uint32_t a = ptx::lower_k_major(rows);
    const uint32_t b = ptx::lower_k_major(keys) + first_column * kSlabRowBytes / 16;
    ptx::pin(to);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * kSlabs; ++i) {
      const int slab = i / 4, offset = (i % 4) * 32;
      ptx::Wgmma<kElement, kColumns>::product_ss(
          to, ptx::descriptor(a + (slab * 64 * kSlabRowBytes + offset) / 16),
          ptx::descriptor(b + (slab * C.columns * kSlabRowBytes + offset) / 16), i > 0);
    }
    ptx::wgmma_commit();
  }

  template <int kCount>
  __device__ __forceinline__ void issue_q_grad(uint32_t (&slopes)[kCount], int first_column,
                                               bool started) {
    const uint32_t k = ptx::lower_mn_major(shared.k[k_ring.slot], C.columns * kSlabRowBytes) +
                       first_column * kSlabRowBytes / 16;
    ptx::pin(slopes);
    ptx::pin(q_grad);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      QueryProduct::product_rs(q_grad, &slopes[4 * i], ptx::descriptor(k + i * kSlabRowBytes),
                               started || i > 0);
    }
    ptx::wgmma_commit();
  }

  // P from S, 0 where a pair is hidden. (P, not S: see hide in backward_elements.h.)
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&scores)[kCount], const StripMask<C>& mask) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = ptx::exp2_fast(__fmaf_rn(scores[i], p.scale_log2, -lse[(i / 2) % 2]));
    }
    if (!mask.hidden) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int bit = 2 * (i / 4) + i % 2;
      const bool visible = (mask.words[(i / 2) % 2][bit / 32] >> (bit % 32)) & 1;
      scores[i] = visible ? scores[i] : 0.0f;
    }
  }

  __device__ __forceinline__ void release_keys() {
    arrive(shared.k_empty[k_ring.slot]);
    k_ring.next();
  }

  __device__ __forceinline__ void release_values(bool last) {
    arrive(shared.v_empty[v_ring.slot]);
    v_ring.next();
    if (last) arrive(shared.q_empty[w]);
  }

  // The kColumns / 64 blocks from mask.first_block on.
  template <int kColumns>
  __device__ __forceinline__ void one_tile(const StripMask<C>& mask, bool started, bool last) {
    float scores[kColumns / 2];     // S, then P
    float grads[kColumns / 2];      // dP
    uint32_t slopes[kColumns / 4];  // dS, packed as dQ's operand
    const int first_column = kColumns == C.columns ? 0 : mask.first_block * C.block_columns();
    issue_piece<kColumns>(scores, shared.q[w], shared.k[k_ring.slot], first_column);
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    issue_piece<kColumns>(grads, shared.out_grad[w], shared.v[v_ring.slot], first_column);
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    weigh(scores, mask);
    ptx::wgmma_wait<0>();
    ptx::pin(grads);
    release_values(last);
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
      const int r = (i / 2) % 2;
      const float low = scores[i] * (grads[i] - sum[r]);
      const float high = scores[i + 1] * (grads[i + 1] - sum[r]);
      slopes[i / 2] = kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
    }
    issue_q_grad(slopes, first_column, started);
    // Not left running under the next softmax: there are no registers for its operand beside that.
    ptx::wgmma_wait<0>();
    ptx::pin(q_grad);
    ptx::pin(slopes);
    release_keys();
  }

  // A tile that shows this strip nothing. Its V must have come before its stage is given back.
  __device__ __forceinline__ void skip_tile(bool last) {
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    release_values(last);
    release_keys();
  }

  // Returns whether q_grad holds something.
  __device__ __forceinline__ bool all_tiles(const Item& item, bool live) {
    bool started = false;
#pragma unroll 1
    for (int i = 0; i < item.count; ++i) {
      const bool last = live && i == item.count - 1;
      shared.k_full[k_ring.slot].wait(k_ring.parity);
      const uint32_t partial = shared.partial[k_ring.slot];
      const StripMask<C> mask = bits.take(live, __any_sync(0xffffffffu, partial != 0));
      if (mask.blocks == 0) {
        skip_tile(last);
        continue;
      }
      if (mask.blocks == C.blocks()) {
        one_tile<C.columns>(mask, started, last);
      } else {
        one_tile<C.block_columns()>(mask, started, last);
      }
      started = true;
    }
    return started;
  }

  __device__ __forceinline__ void read_row_numbers(const Item& item) {
    const int64_t tile =
        (static_cast<int64_t>(item.batch) * p.q_heads + item.head) * p.map.outer_tiles +
        C.warpgroups * item.row_tile + w;
    const float* numbers = p.row_numbers + tile * (2 * kBackwardRows) + 16 * warp + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse[r] = numbers[kLseOfRow * kBackwardRows + 8 * r];
      sum[r] = numbers[kSumOfRow * kBackwardRows + 8 * r];
    }
  }

  __device__ __forceinline__ void store(const Item& item, int first_row) {
    uint16_t* to = static_cast<uint16_t*>(p.q_grad) + item.batch * p.q_grad_batch_stride +
                   item.head * p.q_grad_head_stride;
    store_rows<kHalf>(q_grad, p.scale, to, p.q_grad_row_stride, nullptr, first_row, p.q_len,
                      p.depth, warp, lane);
  }

  __device__ __forceinline__ void run() {
    Ring<kItemSlots> items;
    uint32_t q_parity = 0;
#pragma unroll 1
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const Item& slot = shared.items[items.slot];
      const Item item = {ptx::uniform(slot.row_tile), ptx::uniform(slot.batch),
                         ptx::uniform(slot.head), ptx::uniform(slot.count)};
      arrive(shared.item_empty[items.slot]);
      if (item.count < 0) break;

      const int first_row = item.row_tile * C.rows() + 64 * w;
      const bool live = first_row < p.q_len;  // else there is no Q, and nothing to do but release
      if (live && item.count > 0) {
        read_row_numbers(item);
        shared.q_full[w].wait(q_parity);
        q_parity ^= 1;
      }
      if (!all_tiles(item, live)) {
#pragma unroll
        for (int i = 0; i < C.depth / 2; ++i) q_grad[i] = 0.0f;
      }
      if (live) store(item, first_row);
    }
  }
};

}  // namespace anymask::cuda
