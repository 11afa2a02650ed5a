// Flash attention forward for Hopper (sm_90a): out = softmax(scale Q K^T under a mask) V.
//
// A block has one producer warpgroup and C.warpgroups math warpgroups of 64 query rows. Warp 0 of
// the producer draws items (a row tile of a head) and loads; its other warps make mask bits; a math
// warpgroup keeps scores, probabilities and output in registers. docs/kernels/forward.md has the
// reasons and the figures behind the choices.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/ptx/wgmma.h"
#include "cuda/device/sm90/mask_bits.h"
#include "cuda/device/sm90/schedule.h"
#include "cuda/device/sm90/softmax.h"

namespace anymask::cuda {

// ---- the loading warp ------------------------------------------------------------------------------

template <ForwardConfig C>
struct LoadWarp {
  using Shared = ForwardShared<C>;
  // Looking without a pause takes issue slots from the math warps: 3% of a causal pass.
  static constexpr uint32_t kPollNanoseconds = 200;

  const ForwardParams& p;
  Shared& shared;
  const int lane;

  Ring<kItemSlots> items;  // the slot of the next item to publish
  Item next;
  Ring<C.stages> k_ring, v_ring;
  Item item;
  uint32_t q_parity = 0;  // a bit per warpgroup
  uint32_t q_wanted = 0;  // warpgroups whose Q of this item is still to be loaded

  // A warpgroup frees its Q when its own last Q K^T of the item before is done, and they are done at
  // different times: so Q is loaded whenever one frees it, while this warp waits for other things.
  __device__ __forceinline__ void load_freed_q() {
#pragma unroll
    for (int w = 0; w < C.warpgroups; ++w) {
      if (((q_wanted >> w) & 1) == 0) continue;
      if (!shared.q_empty[w].test(((q_parity >> w) & 1) ^ 1)) continue;
      q_wanted ^= 1u << w;
      q_parity ^= 1u << w;
      if (lane == 0) {
        shared.q_full[w].arrive_expect(Shared::kQBytes);
#pragma unroll
        for (int slab = 0; slab < C.depth / kSlabColumns; ++slab) {
          ptx::load_box(shared.q[w][slab], &p.q, shared.q_full[w], slab * kSlabColumns,
                        item.row_tile * C.rows() + 64 * w, item.head, item.batch);
        }
      }
    }
  }

  __device__ __forceinline__ void wait(const ptx::Barrier& barrier, uint32_t parity) {
    while (q_wanted != 0) {
      load_freed_q();
      if (barrier.wait_for(parity, kPollNanoseconds)) return;
    }
    barrier.wait(parity);
  }

  // K or V of a step: slabs of 64 columns, one box a tile of the plan.
  template <typename Stage>
  __device__ __forceinline__ void load_stage(Stage& stage, const TensorMapBytes& map,
                                             ptx::Barrier& full, int first, int second) {
    const int kv_head = item.head / p.group_heads;
#pragma unroll
    for (int t = 0; t < C.tiles; ++t) {
      const int row = (t == 0 ? first : second) * C.tile_columns();
      int column = 0;
      for (auto& slab : stage) {
        ptx::load_box(slab + t * C.tile_columns() * kSlabRowBytes, &map, full, column, row, kv_head,
                      item.batch);
        column += kSlabColumns;
      }
    }
  }

  __device__ __forceinline__ void load_k(int first, int second, bool partial) {
    wait(shared.k_empty[k_ring.slot], k_ring.parity ^ 1);
    if (lane == 0) {
      shared.partial[k_ring.slot] = partial;
      shared.k_full[k_ring.slot].arrive_expect(Shared::kKBytes);
      load_stage(shared.k[k_ring.slot], p.k, shared.k_full[k_ring.slot], first, second);
    }
    k_ring.next();
  }

  __device__ __forceinline__ void load_v(int first, int second) {
    wait(shared.v_empty[v_ring.slot], v_ring.parity ^ 1);
    if (lane == 0) {
      shared.v_full[v_ring.slot].arrive_expect(Shared::kVBytes);
      load_stage(shared.v[v_ring.slot], p.v, shared.v_full[v_ring.slot], first, second);
    }
    v_ring.next();
  }

  // Loads `item`, and publishes the item after it: before this warp waits for room for the last
  // step, since mask bits take longer to make than the rings hold. `claimed`: in lane 0, that
  // item's number, counted from the first that the counter gave out.
  __device__ __forceinline__ void load_item(int claimed) {
    const int steps = item.count;
    if (steps > 0) {
#pragma unroll
      for (int w = 0; w < C.warpgroups; ++w) {
        if (item.row_tile * C.rows() + 64 * w < p.q_len) q_wanted |= 1u << w;
      }
    }
    // K runs one step ahead of V: its stage frees first, and it is wanted first.
    int first = 0, second = 0;
    StepWalker<C> walker(p, item, lane);
    const int publish_at = steps > 1 ? steps - 2 : 0;
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      if (step < steps) {
        walker.next();
        load_k(walker.first, walker.second, walker.needs_bits);
      }
      if (step > 0) load_v(first, second);
      first = walker.first;
      second = walker.second;
      if (step == publish_at) publish(gridDim.x + __shfl_sync(0xffffffffu, claimed, 0));
    }
    while (q_wanted != 0) load_freed_q();
  }

  // Makes `next` the item at `index` and tells the other warps.
  __device__ __forceinline__ void publish(int index) {
    next = {0, 0, 0, -1};
    if (index < p.items) next = item_at<C>(p, index);
    shared.item_empty[items.slot].wait(items.parity ^ 1);
    if (lane == 0) {
      shared.items[items.slot] = next;
      if (C.masks() != MaskPath::kMachine && next.count > 0) {
        shared.arrays[items.slot] = recipe_arrays(p, next);
      }
      shared.item_full[items.slot].arrive();
    }
    items.next();
  }

  __device__ __forceinline__ void run() {
    // Before the first item comes one without steps, which only publishes.
    next = {0, 0, 0, 0};
    int claimed = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
    do {
      item = next;
      load_item(claimed);
      claimed = 0;
      if (lane == 0 && next.count >= 0 && p.next_item != nullptr) {
        claimed = atomicAdd(p.next_item, 1);
      }
    } while (next.count >= 0);
  }
};

// ---- a math warpgroup --------------------------------------------------------------------------------

// The mask of one tile for this thread: whether its strip is needed at all, whether it has hidden
// pairs, and the bits of its two rows.
template <ForwardConfig C>
struct StripMask {
  bool needed;
  bool hidden;
  uint32_t words[2][C.word_groups()];
};

template <ForwardConfig C>
struct MathWarp {
  static constexpr int kSteps = C.columns / 16;  // of P V: 16 keys each
  using Element = ptx::Element;
  static constexpr Element kElement = C.half ? Element::kF16 : Element::kBf16;
  using ScoreProduct = ptx::Wgmma<kElement, C.columns>;
  using OutputProduct = ptx::Wgmma<kElement, C.value_depth>;

  const ForwardParams& p;
  ForwardShared<C>& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;

  Ring<C.bit_slots> bit_ring;
  float out[C.value_depth / 2];
  float scores[C.columns / 2];
  uint32_t weights[C.columns / 4];  // P, packed as the A operand of P V
  RowState rows;

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return C.half ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // One arrival a warp.
  __device__ __forceinline__ void arrive(ptx::Barrier& barrier) {
    __syncwarp();
    if (lane == 0) barrier.arrive();
  }

  // ---- products ----

  __device__ __forceinline__ void issue_scores(int stage) {
    const uint32_t q = ptx::lower_k_major(shared.q[w]);
    const uint32_t k = ptx::lower_k_major(shared.k[stage]);
    ptx::pin(scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C.depth / 16; ++i) {
      const int slab = i / 4, offset = (i % 4) * 32;
      ScoreProduct::product_ss(
          scores, ptx::descriptor(q + (slab * 64 * kSlabRowBytes + offset) / 16),
          ptx::descriptor(k + (slab * C.columns * kSlabRowBytes + offset) / 16), i > 0);
    }
    ptx::wgmma_commit();
  }

  // After the last Q K^T of an item its next Q may come, while this one's softmax still runs.
  __device__ __forceinline__ void release_keys(const Ring<C.stages>& ring, bool last) {
    arrive(shared.k_empty[ring.slot]);
    if (last) arrive(shared.q_empty[w]);
  }

  // Steps [begin, end) of P V.
  __device__ __forceinline__ void issue_output(int stage, bool started, int begin, int end) {
    const uint32_t v = ptx::lower_mn_major(shared.v[stage], C.columns * kSlabRowBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = begin; i < end; ++i) {
      OutputProduct::product_rs(out, &weights[4 * i],
                                ptx::descriptor(v + i * kSlabRowBytes), started || i > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- masks ----

  __device__ __forceinline__ StripMask<C> take_mask(bool live, bool partial) {
    StripMask<C> mask{live, false, {}};
    if (!partial) return mask;
    shared.bits_full[bit_ring.slot].wait(bit_ring.parity);
    uint32_t classes = 0;
    const int row = 16 * warp + lane / 4;
#pragma unroll
    for (int g = 0; g < C.word_groups(); ++g) {
      classes |= shared.classes[bit_ring.slot][w][g];
      mask.words[0][g] = shared.bits[bit_ring.slot][w][g][row][lane % 4];
      mask.words[1][g] = shared.bits[bit_ring.slot][w][g][row + 8][lane % 4];
    }
    arrive(shared.bits_empty[bit_ring.slot]);
    bit_ring.next();
    classes = ptx::uniform(classes);
    mask.needed = (classes & 0x01010101u) != 0;
    mask.hidden = (classes & 0x02020202u) != 0;
    return mask;
  }

  __device__ __forceinline__ void apply(const StripMask<C>& mask) {
    if (p.negate) {
#pragma unroll
      for (int i = 0; i < C.columns / 2; ++i) scores[i] = -scores[i];
    }
    if (!mask.hidden) return;
#pragma unroll
    for (int i = 0; i < C.columns / 2; ++i) {
      const int bit = 2 * (i / 4) + i % 2;
      const bool visible = (mask.words[(i / 2) % 2][bit / 32] >> (bit % 32)) & 1;
      scores[i] = visible ? scores[i] : kMinusInfinity;
    }
  }

  // ---- softmax ----

  // exp2(score - top) in place, and its sum.
  __device__ __forceinline__ void exponentiate(int begin, int end) {
    float top[2] = {rows.top[0], rows.top[1]};
    if constexpr (C.overlap == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = __fmaf_rn(rows.sum[r], 0.0f, top[r]);
    }
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; ++i) {
      const int r = (i / 2) % 2;
      scores[i] = ptx::exp2_fast(scores[i] * p.scale_log2 - top[r]);
      rows.sum[r] += scores[i];
    }
  }

  // Scores of steps [begin, end) to P, the A operand.
  __device__ __forceinline__ void pack_weights(int begin, int end) {
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; i += 2) weights[i / 2] = pack(scores[i], scores[i + 1]);
  }

  __device__ __forceinline__ bool raise(float (&factor)[2]) {
    float top[2];
    row_maxima(scores, top);
    return rows.raise(top, p.scale_log2, factor);
  }

  // ---- tiles ----

  __device__ __forceinline__ void take_turn() {
    if constexpr (C.turns != 0) ptx::named_sync(1 + w, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C.turns != 0) ptx::named_arrive(1 + (w + 1) % C.warpgroups, 256);
  }

  // Without overlap: three warpgroups keep the tensor cores busy by being in different places.
  __device__ __forceinline__ void plain_tile(const Ring<C.stages>& ring, const StripMask<C>& mask,
                                             bool started, bool last) {
    take_turn();
    issue_scores(ring.slot);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release_keys(ring, last);
    apply(mask);
    float factor[2];
    if (raise(factor) && started) scale_rows(out, factor);
    ptx::pin(out);
    shared.v_full[ring.slot].wait(ring.parity);
    constexpr int kEach = (kSteps + C.pieces - 1) / C.pieces;
#pragma unroll
    for (int begin = 0; begin < kSteps; begin += kEach) {
      const int end = begin + kEach < kSteps ? begin + kEach : kSteps;
      exponentiate(begin, end);
      pack_weights(begin, end);
      issue_output(ring.slot, started, begin, end);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    ptx::pin(weights);
    arrive(shared.v_empty[ring.slot]);
  }

  // With overlap: the first tile of a run only makes P.
  __device__ __forceinline__ void first_tile(const Ring<C.stages>& ring, const StripMask<C>& mask,
                                             bool started, bool last) {
    take_turn();
    issue_scores(ring.slot);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release_keys(ring, last);
    apply(mask);
    float factor[2];
    if (raise(factor) && started) scale_rows(out, factor);
    exponentiate(0, kSteps);
    pack_weights(0, kSteps);
  }

  // Each further one: its Q K^T, then P V of the tile before, whose product runs under this softmax.
  __device__ __forceinline__ void next_tile(const Ring<C.stages>& ring,
                                            const Ring<C.stages>& before,
                                            const StripMask<C>& mask, bool started, bool last) {
    take_turn();
    issue_scores(ring.slot);
    shared.v_full[before.slot].wait(before.parity);
    ptx::pin(out);
    issue_output(before.slot, started, 0, kSteps);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    release_keys(ring, last);
    apply(mask);
    float factor[2];
    const bool moved = raise(factor);
    exponentiate(0, kSteps);
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    ptx::pin(weights);
    arrive(shared.v_empty[before.slot]);
    pack_weights(0, kSteps);  // only now: P of the tile before was still being read
    if (moved) scale_rows(out, factor);
  }

  __device__ __forceinline__ void last_product(const Ring<C.stages>& before, bool started) {
    shared.v_full[before.slot].wait(before.parity);
    ptx::pin(out);
    issue_output(before.slot, started, 0, kSteps);
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    ptx::pin(weights);
    arrive(shared.v_empty[before.slot]);
  }

  // ---- end of an item ----

  __device__ __forceinline__ void store(const Item& item, int first_row) {
    const int q = lane % 4;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows.sum[r];
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      const bool seen = sum > 0.0f;
      inverse[r] = seen ? 1.0f / sum : 0.0f;
      const int row = first_row + 16 * warp + lane / 4 + 8 * r;
      if (q == 0 && row < p.q_len && p.lse != nullptr) {
        constexpr float kLn2 = 0.69314718055994531f;
        const float lse = seen ? (rows.top[r] + ptx::log2_fast(sum)) * kLn2
                               : kMinusInfinity;
        p.lse[(static_cast<int64_t>(item.batch) * p.q_heads + item.head) * p.q_len + row] = lse;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 16 * warp + lane / 4 + 8 * r;
      uint16_t* to = static_cast<uint16_t*>(p.out) + item.batch * p.out_batch_stride +
                     item.head * p.out_head_stride + row * p.out_row_stride;
      // Quads gather 8 columns a lane, so that a row is written 64 bytes at a time.
#pragma unroll
      for (int j = 0; j < C.value_depth / 32; ++j) {
        uint32_t pieces[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (4 * j + i) + 2 * r;
          pieces[i] = pack(out[at] * inverse[r], out[at + 1] * inverse[r]);
        }
        transpose_quad(pieces, q);
        const int column = 8 * (4 * j + q);
        if (row < p.q_len && column < p.value_depth) {
          ptx::store_global(to + column, pieces[0], pieces[1], pieces[2], pieces[3]);
        }
      }
    }
  }

  // ---- the story ----

  __device__ __forceinline__ void run() {
    Ring<kItemSlots> items;
    Ring<C.stages> ring;
    uint32_t q_parity = 0;
    if (w == C.warpgroups - 1) pass_turn();  // the first turn is warpgroup 0's

#pragma unroll 1
    for (;; items.next()) {
      shared.item_full[items.slot].wait(items.parity);
      const Item& slot = shared.items[items.slot];
      const Item item = {ptx::uniform(slot.row_tile), ptx::uniform(slot.batch),
                         ptx::uniform(slot.head), ptx::uniform(slot.count)};
      arrive(shared.item_empty[items.slot]);
      if (item.count < 0) break;

      const int first_row = item.row_tile * C.rows() + 64 * w;
      const bool live = first_row < p.q_len;
      if (live && item.count > 0) {
        shared.q_full[w].wait(q_parity);
        q_parity ^= 1;
      }
      rows.reset();
      bool started = false;  // out holds something
      bool pending = false;  // overlap: P of the tile before waits for its product
      Ring<C.stages> before = ring;

#pragma unroll 1
      for (int t = 0; t < item.count; ++t) {
        const bool last = live && t == item.count - 1;
        shared.k_full[ring.slot].wait(ring.parity);
        const StripMask<C> mask = take_mask(live, ptx::uniform(shared.partial[ring.slot]) != 0);
        if (!(live && mask.needed)) {
          if (pending) {
            last_product(before, started);
            started = true;
            pending = false;
          }
          take_turn();
          pass_turn();
          shared.v_full[ring.slot].wait(ring.parity);
          release_keys(ring, last);
          arrive(shared.v_empty[ring.slot]);
        } else if constexpr (C.overlap == 0) {
          plain_tile(ring, mask, started, last);
          started = true;
        } else if (!pending) {
          first_tile(ring, mask, started, last);
          pending = true;
        } else {
          next_tile(ring, before, mask, started, last);
          started = true;
        }
        before = ring;
        ring.next();
      }
      if (pending) {
        last_product(before, started);
        started = true;
      }
      if (!started) {
#pragma unroll
        for (int i = 0; i < C.value_depth / 2; ++i) out[i] = 0.0f;
      }
      if (live) store(item, first_row);
    }
  }
};

// ---- the kernel ------------------------------------------------------------------------------------------

template <ForwardConfig C>
__device__ __forceinline__ void forward_kernel(const ForwardParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  static_assert(sizeof(ForwardShared<C>) == C.shared_bytes());
  ForwardShared<C>& shared = *reinterpret_cast<ForwardShared<C>*>(memory);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.q);
    ptx::prefetch_map(&p.k);
    ptx::prefetch_map(&p.v);
    shared.init();
  }
  __syncthreads();

  if (warp < kMathWarps) {
    ptx::give_registers<C.load_registers>();
    if (warp == 0) {
      LoadWarp<C> loader{p, shared, lane};
      loader.run();
    } else {
      make_bits<C>(p, shared, warp - 1, lane);
    }
  } else {
    ptx::take_registers<C.math_registers>();
    MathWarp<C> math{p, shared, warp / kMathWarps - 1, warp % kMathWarps, lane};
    math.run();
  }
}

}  // namespace anymask::cuda
