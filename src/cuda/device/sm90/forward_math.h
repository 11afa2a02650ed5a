// A math warpgroup of the Hopper forward kernel: 64 query rows, whose scores, probabilities and
// output stay in registers.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/wgmma.h"
#include "cuda/device/sm90/forward_parts.h"
#include "cuda/device/sm90/forward_store.h"
#include "cuda/device/sm90/pair_bias.h"
#include "cuda/device/sm90/softmax.h"
#include "cuda/device/sm90/strip_bits.h"

namespace anymask::cuda {

template <ForwardConfig C>
struct MathWarp {
  static constexpr auto kElement = C.half ? ptx::Element::kF16 : ptx::Element::kBf16;
  using OutputProduct = ptx::Wgmma<kElement, C.value_depth>;
  // Biases are what the product is added to; after a cap there is no product left to do that.
  static constexpr bool kBiased = C.has(kKeyBias | kBias);
  static constexpr bool kBiasFirst = kBiased && !C.has(kSoftcap);
  static constexpr bool kHasTop = !C.has(kBounded);

  // The scores of 64 rows and kColumns keys, and P made of them, packed as the A operand of P V.
  template <int kColumns>
  struct Tile {
    float scores[kColumns / 2];
    uint32_t weights[kColumns / 4];
    bool uncapped;  // scores are still to be capped, and near 0; with kBounded
  };

  // With halves both warpgroups have the same rows.
  static constexpr int kOwn = C.own_columns();
  __device__ __forceinline__ int strip() const { return C.halves != 0 ? 0 : w; }
  __device__ __forceinline__ int first_column() const { return C.halves != 0 ? kOwn * w : 0; }

  const ForwardParams& p;
  ForwardShared<C>& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.k_stages> k_ring;
  Ring<C.v_stages> v_ring;
  StripBits<C> bits{shared, strip(), warp, lane, {}};
  float out[C.value_depth / 2];
  RowState rows;
  PairBias<C.half != 0, C.has(kBiasTiles)> bias;

  // ---- products ---------------------------------------------------------------------------------

  // Q K^T of kColumns keys from first_column on.
  template <int kColumns>
  __device__ __forceinline__ void issue_scores(Tile<kColumns>& tile, const StripMask<C>& mask,
                                               int first_column) {
    if constexpr (kBiasFirst) give_biases<false>(tile, mask, first_column);
    if constexpr (!kBiased || kBiasFirst) bits.release();
    const uint32_t q = ptx::lower_k_major(shared.q[strip()]);
    const uint32_t k =
        ptx::lower_k_major(shared.k[k_ring.slot]) + first_column * kSlabRowBytes / 16;
    ptx::pin(tile.scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C.depth / 16; ++i) {
      const int slab = i / 4, offset = (i % 4) * 32;
      ptx::Wgmma<kElement, kColumns>::product_ss(
          tile.scores, ptx::descriptor(q + (slab * 64 * kSlabRowBytes + offset) / 16),
          ptx::descriptor(k + (slab * C.columns * kSlabRowBytes + offset) / 16),
          kBiasFirst || i > 0);
    }
    ptx::wgmma_commit();
  }

  // After the last Q K^T of an item its next Q may come, while this one's softmax still runs.
  __device__ __forceinline__ void release_keys(bool last) {
    shared.k_empty[k_ring.slot].arrive_warp(lane);
    k_ring.next();
    if (last) shared.q_empty[strip()].arrive_warp(lane);
  }

  // Sixteens [begin, end) of the keys of P V. `started`: out holds something to add to.
  template <int kColumns>
  __device__ __forceinline__ void issue_output(const Tile<kColumns>& tile, int first_column,
                                               bool started, int begin, int end) {
    const uint32_t v = ptx::lower_mn_major(shared.v[v_ring.slot], C.columns * kSlabRowBytes) +
                       first_column * kSlabRowBytes / 16;
    ptx::wgmma_fence();
#pragma unroll
    for (int i = begin; i < end; ++i) {
      OutputProduct::product_rs(out, &tile.weights[4 * i], ptx::descriptor(v + i * kSlabRowBytes),
                                started || i > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void release_values() {
    shared.v_empty[v_ring.slot].arrive_warp(lane);
    v_ring.next();
  }

  template <int kColumns>
  __device__ __forceinline__ void finish_output(Tile<kColumns>& tile) {
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    ptx::pin(tile.weights);
    release_values();
  }

  // ---- masks ------------------------------------------------------------------------------------

  // Sets the scores to their biases, or adds these to them.
  template <bool kAdd, int kColumns>
  __device__ __forceinline__ void give_biases(Tile<kColumns>& tile, const StripMask<C>& mask,
                                              int first_column) {
    const int column = first_column + 2 * (lane % 4);
    if constexpr (C.has(kBias)) bias.template give<kAdd>(p, mask.first_key + column, tile.scores);
    if constexpr (C.has(kKeyBias)) {
      const float* key_bias = &shared.key_bias[bits.ring.slot][column];
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4) {
        const float2 pair = *reinterpret_cast<const float2*>(key_bias + 2 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float value = j % 2 == 0 ? pair.x : pair.y;
          float& score = tile.scores[i + j];
          score = kAdd || C.has(kBias) ? score + value : value;
        }
      }
    }
  }

  template <int kColumns>
  __device__ __forceinline__ void apply(Tile<kColumns>& tile, const StripMask<C>& mask) {
    if (p.negate) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) tile.scores[i] = -tile.scores[i];
    }
    if (!mask.hidden) return;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const int bit = 2 * (i / 4) + i % 2;
      const bool visible = (mask.words[(i / 2) % 2][bit / 32] >> (bit % 32)) & 1;
      tile.scores[i] = visible ? tile.scores[i] : kMinusInfinity;
    }
  }

  // What has become of Q K^T: the scores, as exp2 takes them but for one factor.
  template <int kColumns>
  __device__ __forceinline__ void take_scores(Tile<kColumns>& tile, const StripMask<C>& mask,
                                              int first_column, bool last) {
    ptx::pin(tile.scores);
    release_keys(last);
    if constexpr (C.has(kBounded)) {
      tile.uncapped = !mask.hidden && all_near(p.scores.cap, tile.scores);
      if (tile.uncapped) return;
    }
    if constexpr (C.has(kSoftcap)) {
      // Wide tiles of shallow heads have no register to spare, and wait for exp2 already.
      if constexpr (C.columns <= 128) {
        cap_scores_fast(p.scores.cap, tile.scores);
      } else {
        cap_scores(p.scores.cap, tile.scores);
      }
    }
    if constexpr (kBiased && !kBiasFirst) {
      ptx::pin(tile.scores);
      give_biases<true>(tile, mask, first_column);
      bits.release();
    }
    apply(tile, mask);
  }

  // ---- softmax ----------------------------------------------------------------------------------

  // exp2(score - top) of sixteens [begin, end) in place, and its sum.
  template <int kColumns>
  __device__ __forceinline__ void exponentiate(Tile<kColumns>& tile, int begin, int end) {
    float top[2] = {rows.top[0], rows.top[1]};
    // Adds 0. It ties a piece to the sums of the piece before: else the assembler leaves the sums
    // for later, keeps all exponentials for them, and at 160 registers spills 20.
    if constexpr (C.overlap == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = __fmaf_rn(rows.sum[r], 0.0f, top[r]);
    }
    if constexpr (C.has(kBounded)) {
      if (tile.uncapped) {
#pragma unroll
        for (int i = 8 * begin; i < 8 * end; ++i) {
          const int r = (i / 2) % 2;
          tile.scores[i] = ptx::exp2_fast(near_exponent(p.scores.cap, tile.scores[i], -top[r]));
          rows.sum[r] += tile.scores[i];
        }
        return;
      }
    }
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; ++i) {
      const int r = (i / 2) % 2;
      tile.scores[i] = ptx::exp2_fast(tile.scores[i] * p.scale_log2 - top[r]);
      rows.sum[r] += tile.scores[i];
    }
  }

  // Weights that are dropped count in the sums, but not in the output.
  template <int kColumns>
  __device__ __forceinline__ void drop_weights(Tile<kColumns>& tile, const StripMask<C>& mask,
                                               int begin, int end) {
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; ++i) {
      const int bit = 2 * (i / 4) + i % 2;
      const bool kept = (mask.kept[(i / 2) % 2][bit / 32] >> (bit % 32)) & 1;
      tile.scores[i] = kept ? tile.scores[i] : 0.0f;
    }
  }

  template <int kColumns>
  __device__ __forceinline__ void pack_weights(Tile<kColumns>& tile, int begin, int end) {
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; i += 2) {
      tile.weights[i / 2] = pack_output<C>(tile.scores[i], tile.scores[i + 1]);
    }
  }

  template <int kColumns>
  __device__ __forceinline__ bool raise(const Tile<kColumns>& tile, float (&factor)[2]) {
    if constexpr (!kHasTop) return false;
    constexpr bool kBounds = C.columns <= 128 || C.features == 0;  // else spills in the loop
    return rows.raise<kBounds>(tile.scores, p.scale_log2, factor);
  }

  // ---- tiles ------------------------------------------------------------------------------------

  // Without overlap, the kColumns / 64 blocks from mask.first_block on: three warpgroups keep the
  // tensor cores busy by being in different places.
  template <int kColumns>
  __device__ __forceinline__ void plain_tile(const StripMask<C>& mask, bool started, bool last) {
    Tile<kColumns> tile;
    const int first_column = kColumns == C.columns ? 0 : mask.first_block * C.block_columns();
    issue_scores(tile, mask, first_column);
    ptx::wgmma_wait<0>();
    take_scores(tile, mask, first_column, last);
    float factor[2];
    if (raise(tile, factor) && started) scale_rows(out, factor);
    ptx::pin(out);
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    constexpr int kSixteens = kColumns / 16;
    constexpr int kEach = (C.columns / 16 + C.pieces - 1) / C.pieces;
#pragma unroll
    for (int begin = 0; begin < kSixteens; begin += kEach) {
      const int end = begin + kEach < kSixteens ? begin + kEach : kSixteens;
      exponentiate(tile, begin, end);
      if constexpr (C.has(kDropout)) drop_weights(tile, mask, begin, end);
      pack_weights(tile, begin, end);
      issue_output(tile, first_column, started, begin, end);
    }
    bits.release_copied(mask);
    finish_output(tile);
  }

  // With overlap: the first tile of a run only makes P.
  __device__ __forceinline__ void first_tile(Tile<kOwn>& tile, const StripMask<C>& mask,
                                             bool started, bool last) {
    issue_scores(tile, mask, first_column());
    ptx::wgmma_wait<0>();
    take_scores(tile, mask, first_column(), last);
    float factor[2];
    const bool moved = raise(tile, factor);
    bits.release_copied(mask);
    if (moved && started) scale_rows(out, factor);
    exponentiate(tile, 0, kOwn / 16);
    if constexpr (C.has(kDropout)) drop_weights(tile, mask, 0, kOwn / 16);
    pack_weights(tile, 0, kOwn / 16);
  }

  // Each further one: its Q K^T, then P V of the tile before, whose product runs under this
  // softmax.
  __device__ __forceinline__ void next_tile(Tile<kOwn>& tile, const StripMask<C>& mask,
                                            bool started, bool last) {
    issue_scores(tile, mask, first_column());
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    ptx::pin(out);
    issue_output(tile, first_column(), started, 0, kOwn / 16);
    ptx::wgmma_wait<1>();
    take_scores(tile, mask, first_column(), last);
    float factor[2];
    const bool moved = raise(tile, factor);
    bits.release_copied(mask);
    exponentiate(tile, 0, kOwn / 16);
    if constexpr (C.has(kDropout)) drop_weights(tile, mask, 0, kOwn / 16);
    finish_output(tile);
    pack_weights(tile, 0, kOwn / 16);  // only now: P of the tile before was being read
    if (moved) scale_rows(out, factor);
  }

  // P V of the last tile of a run.
  __device__ __forceinline__ void last_output(Tile<kOwn>& tile, bool started) {
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    ptx::pin(out);
    issue_output(tile, first_column(), started, 0, kOwn / 16);
    finish_output(tile);
  }

  // A tile that shows this strip nothing. Its V must have come before its stage is given back.
  __device__ __forceinline__ void skip_tile(const StripMask<C>& mask, bool last) {
    shared.v_full[v_ring.slot].wait(v_ring.parity);
    bits.release();
    bits.release_copied(mask);
    release_keys(last);
    release_values();
  }

  // Takes the next tile's mask, once its K is there.
  __device__ __forceinline__ StripMask<C> next_mask(bool live) {
    shared.k_full[k_ring.slot].wait(k_ring.parity);
    const uint32_t partial = shared.partial[k_ring.slot];
    constexpr uint32_t kPartial = C.has(kBias) ? 1 : ~0u;
    StripMask<C> mask = bits.take(live, __any_sync(0xffffffffu, (partial & kPartial) != 0));
    if constexpr (C.has(kBias)) mask.first_key = ptx::uniform(partial / 2) * C.columns;
    if constexpr (C.halves != 0) {
      static_assert(kOwn == 64 && C.word_groups() == 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mask.words[r][0] >>= 16 * w;
        mask.kept[r][0] >>= 16 * w;
      }
    }
    return mask;
  }

  // Both return whether out holds something.
  __device__ __forceinline__ bool plain_item(const Item& item, bool live) {
    constexpr int kOne = C.block_columns();
    constexpr int kTwo = C.blocks() > 2 ? 2 * kOne : kOne;
    bool started = false;
#pragma unroll 1
    for (int i = 0; i < item.count; ++i) {
      const bool last = live && i == item.count - 1;
      const StripMask<C> mask = next_mask(live);
      if (mask.blocks == C.blocks()) {
        plain_tile<C.columns>(mask, started, last);
      } else if (C.blocks() > 2 && mask.blocks == 2) {
        plain_tile<kTwo>(mask, started, last);
      } else if (C.blocks() > 1 && mask.blocks == 1) {
        plain_tile<kOne>(mask, started, last);
      } else {
        skip_tile(mask, last);
        continue;
      }
      started = true;
    }
    return started;
  }

  __device__ __forceinline__ bool overlapped_item(const Item& item, bool live) {
    Tile<kOwn> tile;
    bool started = false;
    bool pending = false;  // P of the tile before waits for its product
#pragma unroll 1
    for (int i = 0; i < item.count; ++i) {
      const bool last = live && i == item.count - 1;
      const StripMask<C> mask = next_mask(live);
      if (mask.blocks == 0) {
        if (pending) {
          last_output(tile, started);
          started = true;
          pending = false;
        }
        skip_tile(mask, last);
      } else if (!pending) {
        first_tile(tile, mask, started, last);
        pending = true;
      } else {
        next_tile(tile, mask, started, last);
        started = true;
      }
    }
    if (pending) last_output(tile, started);
    return started || pending;
  }

  // ---- the story --------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    Ring<kItemSlots> items;
    uint32_t q_parity = 0;
    if (C.halves != 0 && w == 0 && warp == 0) ptx::named_arrive(kHalfEmptyBarrier, 64);
#pragma unroll 1
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const Item& slot = shared.items[items.slot];
      const Item item = {ptx::uniform(slot.row_tile), ptx::uniform(slot.batch),
                         ptx::uniform(slot.head), ptx::uniform(slot.count)};
      RowPart part{};
      if constexpr (C.cuts != 0) {
        const RowPart& published = shared.parts[items.slot];
        part = {ptx::uniform(published.row_tile), ptx::uniform(published.first_block),
                ptx::uniform(published.parts), ptx::uniform(published.index), published.first_tile};
      }
      shared.item_empty[items.slot].arrive_warp(lane);
      if (item.count < 0) break;

      const int first_row = item.row_tile * C.rows() + 64 * strip();
      const bool live = first_row < p.q_len;  // else there is no Q, and nothing to do but release
      if (live && item.count > 0) {
        shared.q_full[strip()].wait(q_parity);
        q_parity ^= 1;
      }
      rows.reset();
      if constexpr (!kHasTop) rows.top[0] = rows.top[1] = 0.0f;
      if constexpr (C.has(kBias)) {
        if (live) bias.start_item(p, item, first_row + 16 * warp + lane / 4);
      }
      bool started;
      if constexpr (C.overlap != 0) {
        started = overlapped_item(item, live);
      } else {
        started = plain_item(item, live);
      }
      if (!started) {
#pragma unroll
        for (int i = 0; i < C.value_depth / 2; ++i) out[i] = 0.0f;
      }
      if constexpr (C.halves != 0) {
        if (warp != 0) continue;
        if (!join_halves<C>(shared, w, lane, rows, out)) continue;
      }
      if constexpr (C.cuts != 0) {
        if (part.parts > 1) {
          const PartJoin<C> join{p, part, kMathWarps * strip() + warp, lane};
          if (first_row + 16 * warp >= p.q_len || !join.run(shared, item, rows, out)) continue;
        }
      }
      if (live) store_output<C>(p, item, first_row + 16 * warp + lane / 4, lane % 4, rows, out);
    }
    if constexpr (C.halves != 0) {
      if (p.parts != nullptr) join_at_end<C>(p, shared, w, warp, lane);
    }
  }
};

}  // namespace anymask::cuda
