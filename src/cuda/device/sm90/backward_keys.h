// dK and dV of a tile of keys, in the Hopper backward kernel that makes dQ apart from them.
//
// A math warpgroup owns 64 keys, whose S^T, dP^T, dK and dV stay in registers while Q and dO go by,
// 64 rows a step. As in backward_math.h, but nobody else needs dS, so dV runs under it.
#pragma once

#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_split_math.h"

namespace anymask::cuda {

template <SplitConfig C>
struct KeyPhase {
  using Shared = SplitShared<C>;
  static constexpr BackwardConfig kKeys = C.keys();
  static constexpr bool kHalf = kKeys.half != 0;

  const SplitParams& p;
  Shared& shared;
  SplitPlace<C>& at;
  Ring<kKeys.bit_slots>& bit_ring;
  int& run_slot;  // where the runs of the item's keys are, or -1

  // S^T or dP^T with what the rows' statistics add to it: units 0 or 1.
  template <int kSlabs>
  __device__ __forceinline__ void issue_piece(float (&to)[kPieceValues],
                                              const uint8_t (&keys)[kSlabs][Shared::kSlabBytes],
                                              const uint8_t (&rows)[kSlabs][Shared::kSlabBytes],
                                              int units, int slot) {
    ptx::pin(to);
    ptx::wgmma_fence();
    at.multiply(to, keys, rows);
    add_stats<kHalf>(to, shared.units[units], (2 - units) * 128, shared.stats[slot]);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_scores(float (&piece)[kPieceValues], int own, int slot) {
    issue_piece(piece, shared.inner[own], shared.inner[slot], 0, slot);
  }

  // Where take_step is.
  int steps = 0;     // not begun
  int own_rows = 0;  // a bit for each of the tile's own that is still to be met
  int slot = 0;      // of the step
  int about = 0;     // as SplitShared::about has it

  __device__ __forceinline__ int partial() const { return about & ((1 << kPartialBits) - 1); }
  __device__ __forceinline__ int row() const { return (about >> kPartialBits) * kBackwardRows; }

  // The runs of a new head's rows.
  __device__ __forceinline__ void take_runs() {
    if (run_slot >= 0) shared.key_bits_empty[run_slot].arrive_warp(at.lane);
    run_slot = bit_ring.slot;
    shared.key_bits_full[run_slot].wait(bit_ring.parity);
    bit_ring.next();
    int first = 0x7fffffff, end = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = 64 * at.w + 32 * i + at.lane;
      const int begin = shared.runs[run_slot].ends[0][key],
                ends = shared.runs[run_slot].ends[1][key];
      if (begin >= ends) continue;
      first = rules::min_of(first, begin);
      end = rules::max_of(end, ends);
    }
    int2& seen = shared.seen[kMathWarps * at.w + at.warp];
    seen = {__reduce_min_sync(0xffffffffu, first), __reduce_max_sync(0xffffffffu, end)};
    __syncwarp();
  }

  // To the next 64 rows, if there are any. Whether they see any of this warpgroup's keys; else they
  // are done with.
  __device__ __forceinline__ bool take_step() {
    if (steps == 0) return false;
    --steps;
    slot = at.rows & 255;
    if (own_rows == 0) {
      slot = at.slots.take();
      at.wait_for(slot);
    } else {
      if ((own_rows & 1) == 0) slot = at.rows >> 8;
      own_rows &= own_rows - 1;
    }
    slot = ptx::uniform(slot);
    at.slots.put(slot);
    about = ptx::uniform(shared.about[slot]);
    if (!Shared::kHandsOverRuns || partial() == 0) return true;
    if (partial() == 2) take_runs();
    const int2 seen = shared.seen[kMathWarps * at.w + at.warp];
    if (ptx::uniform(row() < seen.y && row() + kBackwardRows > seen.x)) return true;
    at.release(slot);
    return false;
  }

  // To the next that see any, if there are any.
  __device__ __forceinline__ bool find_step() {
    while (steps > 0) {
      if (take_step()) return true;
      at.return_keys();  // the next steps may come to where these were
    }
    return false;
  }

  __device__ __forceinline__ void make_weights(float (&scores)[kPieceValues],
                                               uint32_t (&weights)[kPieceValues / 2]) {
    weights_from_scores(scores, p.keys.scale_log2);
    if (partial() != 0) {
      uint32_t words[2][2];
      const int key = 64 * at.w + 16 * at.warp + at.lane / 4;
      if constexpr (Shared::kHandsOverRuns) {
        words_of_runs(p.keys, shared.runs[run_slot], key, at.lane % 4, row(), words);
      } else {
        shared.key_bits_full[bit_ring.slot].wait(bit_ring.parity);
        read_words(shared.key_bits[bit_ring.slot], key, at.lane % 4, words);
        shared.key_bits_empty[bit_ring.slot].arrive_warp(at.lane);
        bit_ring.next();
      }
      hide(scores, words);
    }
#pragma unroll
    for (int i = 0; i < kPieceValues; i += 2) {
      weights[i / 2] = pack_pair<kHalf>(scores[i], scores[i + 1]);
    }
  }

  // This warpgroup's 64 keys of dK or dV to where their K or V was.
  template <int kDepth, int kSlabs>
  __device__ __forceinline__ void put_away(const float (&grad)[kDepth / 2], float scale,
                                           uint8_t (&slot)[kSlabs][Shared::kSlabBytes]) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      uint32_t packed[kPieceValues / 2];
      pack_slab<kHalf>(grad, slab, scale, packed);
      store_fragments(fragment_address(slot[slab], 16 * at.warp, at.lane), packed);
    }
  }

  // What has been put away leaves, a warp's 16 keys at a time: by the copy engine, unless each key
  // has to go to a place of its own.
  __device__ __forceinline__ void send(int own) {
    const SplitTile tile = at.tile_of_phase();
    const int first_key = tile.tile * kKeys.columns() + 64 * at.w + 16 * at.warp;
    ptx::fence_async_shared();
    __syncwarp();
    if (p.keys.program.key_order != nullptr) {
      const int32_t* order = key_order(p.keys, {tile.tile, tile.batch, tile.head, 0, 0, 0});
      const auto scatter = [&](auto& slabs, void* to, int64_t batch_stride, int64_t head_stride,
                               int64_t row_stride, int depth) {
        constexpr int kSlabs = sizeof(slabs) / Shared::kSlabBytes;
        copy_rows<kSlabs, Shared::kSlabBytes>(
            slabs[0] + 16 * at.warp * kSlabRowBytes,
            static_cast<uint16_t*>(to) + tile.batch * batch_stride + tile.head * head_stride,
            row_stride, order, first_key, p.keys.kv_len, depth, at.lane);
      };
      scatter(shared.values[own], p.keys.v_grad, p.keys.v_grad_batch_stride,
              p.keys.v_grad_head_stride, p.keys.v_grad_row_stride, p.keys.value_depth);
      scatter(shared.inner[own], p.keys.k_grad, p.keys.k_grad_batch_stride,
              p.keys.k_grad_head_stride, p.keys.k_grad_row_stride, p.keys.depth);
      return;
    }
    if (at.lane != 0) return;
    const auto leave = [&](const TensorMapBytes& map, auto& slabs) {
      int column = 0;
      for (auto& slab : slabs) {
        ptx::store_box(&map, slab + 16 * at.warp * kSlabRowBytes, column, first_key, tile.head,
                       tile.batch);
        column += kSlabColumns;
      }
    };
    leave(p.keys.v_grad_map, shared.values[own]);
    leave(p.keys.k_grad_map, shared.inner[own]);
    ptx::bulk_commit();
  }

  __device__ __forceinline__ void run(const SplitPhase& phase) {
    // Also for keys that nobody sees: zeros leave by way of them too.
    if (!phase.keys_stay) at.keys = at.take_both();
    const int own = at.own(at.keys);
    float k_grad[kKeys.depth / 2], v_grad[kKeys.value_depth / 2];
#pragma unroll
    for (int i = 0; i < kKeys.depth / 2; ++i) k_grad[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys.value_depth / 2; ++i) v_grad[i] = 0.0f;
    steps = phase.steps;
    own_rows = phase.rows_stay;
    if (find_step()) {
      float piece[kPieceValues];           // S, then P; or dP
      uint32_t weights[kPieceValues / 2];  // P, packed as the A operand of dV
      uint32_t slopes[kPieceValues / 2];   // dS, of dK
      issue_scores(piece, own, slot);
      at.return_keys();
      ptx::wgmma_wait<0>();
      ptx::pin(piece);
#pragma unroll 1
      for (;;) {
        const int now = slot;
        make_weights(piece, weights);
        issue_piece(piece, shared.values[own], shared.values[now], 1, now);
        at.add_product(v_grad, weights, shared.values[now]);
        ptx::wgmma_wait<1>();
        ptx::pin(piece);
        const auto weight = [&](int i) {
          return i % 2 == 0 ? ptx::low_of<kHalf>(weights[i / 2])
                            : ptx::high_of<kHalf>(weights[i / 2]);
        };
        pack_slopes<kHalf>(piece, weight, slopes);
        at.add_product(k_grad, slopes, shared.inner[now]);
        // With rows in between that see nothing this slot has to be given back first: all others
        // may wait for it.
        const bool at_once = take_step();
        if (!at_once) {
          ptx::wgmma_wait<0>();
          at.release(now);
          if (!find_step()) break;
        }
        issue_scores(piece, own, slot);
        ptx::wgmma_wait<0>();
        ptx::pin(piece);
        ptx::pin(weights);
        ptx::pin(v_grad);
        ptx::pin(k_grad);
        ptx::pin(slopes);
        if (at_once) at.release(now);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(weights);
      ptx::pin(v_grad);
      ptx::pin(k_grad);
      ptx::pin(slopes);
    }
    at.return_keys();
    if (phase.keys_stay) at.await_keys_read();
    put_away<kKeys.value_depth>(v_grad, 1.0f, shared.values[own]);
    put_away<kKeys.depth>(k_grad, p.keys.scale, shared.inner[own]);
    send(own);
    at.leaving = at.keys;
    at.slots.put(at.keys & 255);
    at.slots.put(at.keys >> 8);
  }
};

}  // namespace anymask::cuda
