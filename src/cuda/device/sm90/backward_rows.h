// dQ of a tile of rows, in the Hopper backward kernel that makes it apart from dK and dV.
//
// A math warpgroup owns 64 query rows, whose S, dP and dQ stay in registers while K and V go by, 64
// keys a step. dQ of a step runs with the next S, under nothing that needs its registers.
#pragma once

#include "cuda/device/sm90/backward_row_stats.h"
#include "cuda/device/sm90/backward_split_math.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

template <SplitConfig C>
struct RowPhase {
  using Shared = SplitShared<C>;
  static constexpr ForwardConfig kRows = C.rows();
  static constexpr bool kHalf = kRows.half != 0;
  static_assert(kRows.rows() == 128 && kRows.columns == 128 && kRows.blocks() == 2);

  const SplitParams& p;
  Shared& shared;
  SplitPlace<C>& at;
  Ring<kRows.bit_slots>& bits;

  bool live;             // the warpgroup has rows
  int steps = 0;         // not begun
  int slot = 0;          // of the step
  bool stays = false;    // it is not to be given back after this
  uint32_t classes = 0;  // of the tile of 128 keys: visible and hidden pairs, two bits each
  uint32_t words[2] = {};

  RowNumbers numbers[2];  // of this thread's two rows

  // Of a tile of 128 keys: what the mask leaves of it for this strip.
  __device__ __forceinline__ void take_mask(bool partial) {
    classes = live ? 3 : 0;
    if (!partial) return;
    shared.bits_full[bits.slot].wait(bits.parity);
    uint32_t all = shared.bits[bits.slot].classes[at.w][0];
    const int row = 16 * at.warp + at.lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      words[r] = shared.bits[bits.slot].words[at.w][0][row + 8 * r][at.lane % 4];
    }
    all |= all >> 16;
    all |= all >> 8;
    shared.bits_empty[bits.slot].arrive_warp(at.lane);
    bits.next();
    if (live) classes = ptx::uniform(all & 15);
  }

  // To the next 64 keys, if there are any. Whether they show this strip something; else they are
  // done with.
  __device__ __forceinline__ bool take_step(const SplitPhase& phase) {
    if (steps == 0) return false;
    slot = at.slots.take();
    stays = phase.keys_stay && steps <= 2;
    at.wait_for(slot);
    if (steps % 2 == 0) {
      take_mask(ptx::uniform(shared.about[slot]) != 0);
    } else {  // the tile's second half
      classes >>= 1;
#pragma unroll
      for (int r = 0; r < 2; ++r) words[r] >>= 16;
    }
    if (!stays) {
      at.slots.put(slot);
    } else if (steps == 2) {
      at.keys = slot;
    } else {
      at.keys |= slot << 8;
    }
    --steps;
    if ((classes & 1) != 0) return true;
    if (!stays) at.release(slot);
    return false;
  }

  // To the next that show it something, if there are any.
  __device__ __forceinline__ bool find_step(const SplitPhase& phase) {
    while (steps > 0) {
      if (take_step(phase)) return true;
      at.return_keys();  // the next steps may come to where these were
    }
    return false;
  }

  // The strip's rows of Q. Products whose operands both come from shared memory need all of its
  // bandwidth; for dO, too, there are no registers.
  uint32_t queries[Shared::kSlabs][kPieceValues / 2];

  // Else addresses that the lane decides are found once for all items, and spilled.
  __device__ __forceinline__ int lane() const { return static_cast<int>(ptx::opaque(at.lane)); }

  __device__ __forceinline__ void take_queries(int own) {
#pragma unroll
    for (int slab = 0; slab < Shared::kSlabs; ++slab) {
      load_fragments(fragment_address(shared.inner[own][slab], 16 * at.warp, lane()),
                     queries[slab]);
    }
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[kPieceValues]) {
    ptx::pin(scores);
#pragma unroll
    for (int slab = 0; slab < Shared::kSlabs; ++slab) ptx::pin(queries[slab]);
    ptx::wgmma_fence();
    at.multiply(scores, queries, shared.inner[ptx::uniform(slot)]);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_grads(float (&grads)[kPieceValues], int own) {
    ptx::pin(grads);
    ptx::wgmma_fence();
    at.multiply(grads, shared.values[own], shared.values[ptx::uniform(slot)]);
    ptx::wgmma_commit();
  }

  // P from S, 0 where a pair is hidden. (P, not S: see hide in backward_elements.h.)
  __device__ __forceinline__ void weigh(float (&scores)[kPieceValues]) {
#pragma unroll
    for (int i = 0; i < kPieceValues; ++i) {
      scores[i] =
          ptx::exp2_fast(__fmaf_rn(scores[i], p.rows.scale_log2, -numbers[(i / 2) % 2].lse));
    }
    if ((classes & 4) == 0) return;
#pragma unroll
    for (int i = 0; i < kPieceValues; ++i) {
      const bool visible = (words[(i / 2) % 2] >> (2 * (i / 4) + i % 2)) & 1;
      scores[i] = visible ? scores[i] : 0.0f;
    }
  }

  __device__ __forceinline__ void run(const SplitPhase& phase) {
    const SplitTile begun = at.tile_of_phase();
    live = begun.tile * kRows.rows() + 64 * at.w < p.keys.q_len;
    steps = phase.steps;
    if (steps > 0) {
      at.rows = at.take_both();
    }
    const int own = at.own(at.rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * at.warp + lane() / 4 + 8 * r;
      numbers[r] = read_stats<kHalf>(p.keys, shared.stats[own][row]);
    }

    take_queries(own);
    float scores[kPieceValues];         // S, then P
    float grads[kPieceValues];          // dP
    uint32_t slopes[kPieceValues / 2];  // dS, packed as dQ's operand
    float q_grad[C.keys().depth / 2];
#pragma unroll
    for (int i = 0; i < C.keys().depth / 2; ++i) q_grad[i] = 0.0f;
    if (find_step(phase)) {
      issue_scores(scores);
      issue_grads(grads, own);
      at.return_keys();
#pragma unroll 1
      for (;;) {
        ptx::wgmma_wait<1>();
        ptx::pin(scores);
        weigh(scores);
        ptx::wgmma_wait<0>();
        ptx::pin(grads);
#pragma unroll
        for (int i = 0; i < kPieceValues; i += 2) {
          const float sum = numbers[(i / 2) % 2].sum;
          slopes[i / 2] =
              pack_pair<kHalf>(scores[i] * (grads[i] - sum), scores[i + 1] * (grads[i + 1] - sum));
        }
        const int now = slot;
        const bool now_stays = stays;
        at.add_product(q_grad, slopes, shared.inner[ptx::uniform(now)]);
        // With keys in between that show nothing this slot has to be given back first: all others
        // may wait for it.
        const bool at_once = take_step(phase);
        if (!at_once) {
          ptx::wgmma_wait<0>();
          if (!now_stays) at.release(now);
          if (!find_step(phase)) break;
        }
        issue_scores(scores);
        issue_grads(grads, own);
        ptx::wgmma_wait<2>();
        ptx::pin(q_grad);
        ptx::pin(slopes);
        if (at_once && !now_stays) at.release(now);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(q_grad);
      ptx::pin(slopes);
    }
    at.return_keys();
    if (phase.keys_stay) shared.keys_read.arrive_warp(at.lane);
    if (phase.steps > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((phase.rows_stay >> i & 1) != 0) continue;
        const int own_rows = (at.rows >> (8 * i)) & 255;
        at.slots.put(own_rows);
        at.release(own_rows);
      }
    }
    const SplitTile tile = at.tile_of_phase();
    const int first_row = tile.tile * kRows.rows() + 64 * at.w + 16 * at.warp;
    if (first_row >= p.keys.q_len) return;
#pragma unroll
    for (int slab = 0; slab < Shared::kSlabs; ++slab) {
      store_piece<kHalf, 0>(shared.grads[kMathWarps * at.w + at.warp], p.q_grad_map, q_grad, slab,
                            p.keys.scale, first_row, tile.head, tile.batch, lane());
    }
  }
};

}  // namespace anymask::cuda
