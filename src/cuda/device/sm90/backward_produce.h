// The Hopper backward kernel's warp that loads.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/sm90/backward_bias_tiles.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_schedule.h"

namespace anymask::cuda {

template <BackwardConfig C>
__device__ __forceinline__ void backward_load(const BackwardParams& p, BackwardShared<C>& shared,
                                              int lane) {
  using Shared = BackwardShared<C>;
  Ring<kItemSlots> items;
  Ring<C.q_stages> q_ring;
  Ring<C.o_stages> o_ring;
  Ring<C.bit_slots> bit_ring;
  Ring<kSentSlots> sent_ring;
  Ring<C.k_stages> k_ring;
  uint32_t v_parity = 1;  // of v_empty
  // A slot is free when the math warps have read its bits. `baked`: what is copied to it, or null.
  auto ask_for_bits = [&](const BitRequest& request, const KeptRequest& kept,
                          const uint32_t* baked) {
    shared.bits_empty[bit_ring.slot].wait(bit_ring.parity ^ 1);
    if (lane == 0) {
      ptx::Barrier& full = shared.bits_full[bit_ring.slot];
      if (C.baked() && baked != nullptr) {
        full.expect(Shared::kBitBytes);
        ptx::load_bytes(shared.bits[bit_ring.slot], baked, Shared::kBitBytes, full);
      }
      if constexpr (C.makes_bits()) {
        if constexpr (C.has(kDropout)) shared.kept_requests[bit_ring.slot] = kept;
        shared.requests[bit_ring.slot] = request;
        shared.request_full[bit_ring.slot].arrive();
      } else {
        full.arrive();
      }
    }
    bit_ring.next();
  };

  auto load_k = [&](const BackwardItem& item) {
    shared.k_empty[k_ring.slot].wait(k_ring.parity ^ 1);
    if (lane == 0) {
      ptx::Barrier& full = shared.k_full[k_ring.slot];
      full.arrive_expect(Shared::kKBytes);
#pragma unroll
      for (int slab = 0; slab < Shared::kSlabs; ++slab) {
        ptx::load_box_once(shared.k[k_ring.slot][slab], &p.k, full, slab * kSlabColumns,
                           item.key_tile * C.columns(), item.kv_head, item.batch);
      }
    }
    k_ring.next();
  };
  auto load_v = [&](const BackwardItem& item) {
    shared.v_empty.wait(v_parity);
    v_parity ^= 1;
    if (lane == 0) {
      shared.v_full.arrive_expect(Shared::kVBytes);
#pragma unroll
      for (int slab = 0; slab < Shared::kValueSlabs; ++slab) {
        ptx::load_box_once(shared.v[slab], &p.v, shared.v_full, slab * kSlabColumns,
                           item.key_tile * C.columns(), item.kv_head, item.batch);
      }
    }
  };

  int index = blockIdx.x;
  for (;;) {
    BackwardItem item = {0, 0, 0, -1, 0, 0};
    if (index < p.items) item = item_at<C>(p, shared.chunk, index);
    if (C.adds_keys != 0 && item.steps == 0) {
      if (p.segments > 1) pass_over(p, item, index, lane);
      index = p.blocks + draw_item(p.next_item, lane);
      continue;
    }
    shared.item_empty[items.slot].wait(items.parity ^ 1);
    if (lane == 0) {
      shared.items[items.slot] = item;
      shared.item_full[items.slot].arrive();
    }
    if (item.steps < 0) break;
    // Asked for now, needed only when this item's loads are out. Chained, an item that is claimed
    // and not begun holds up all that come after it in the order of sums: claimed when it is
    // needed.
    int claimed = 0;
    if (!C.has_turns() && lane == 0) claimed = atomicAdd(p.next_item, 1);

    bool first = true;
#pragma unroll 1
    for (int i = 0; i < heads_of_item<C>(p); ++i) {
      const int head = item.first_head + i;
      const rules::Place place = mask_place(p, item.batch, head);
      bool fresh = true;
      int begins = first ? StepPlace::kFirstHead : StepPlace::kNextHead;
      const int first_tile = (item.batch * p.q_heads + head) * p.row_tiles;
      constexpr int kBakedWords = plan::column_tile_words(C.tile());
      const uint32_t* baked = nullptr;  // the head's first tile
      if constexpr (C.baked()) {
        const int64_t row = map_row(p, p.columns, place, item.key_tile);
        baked = p.columns.baked + row * p.columns.inner_tiles * kBakedWords;
      }
      const auto visit = [&](const RowTile& visited) {
        const int row = visited.tile * kBackwardRows;
        BackwardStep step = {first_tile + visited.tile, row, 0, visited.turn,
                             visited.last ? head : -1};
        if (C.has(kDropout) || visited.partial != 0) {  // dropout: pairs are kept in every tile
          step.partial = visited.partial == 0 ? 0 : fresh ? 2 : 1;
          if (fresh || C.masks() != MaskPath::kRuns) {
            ask_for_bits(
                {item.key_tile, visited.tile, place, fresh}, {item.batch, head, step.partial},
                visited.partial != 0 ? baked + int64_t{visited.tile} * kBakedWords : nullptr);
          }
          if (!C.has(kDropout) || visited.partial != 0) fresh = false;
        }
        shared.q_empty[q_ring.slot].wait(q_ring.parity ^ 1);
        if (lane == 0) {
          ptx::Barrier& full = shared.q_full[q_ring.slot];
          shared.steps[q_ring.slot] = step;
          if constexpr (Shared::kPlaced) {
            shared.step_places[q_ring.slot] = {head, item.batch, item.key_tile, begins};
            begins = 0;
          }
          if constexpr (C.has_query() || C.has_turns()) shared.sent[sent_ring.slot] = step;
          if constexpr (C.has_turns()) shared.sent_full[sent_ring.slot].arrive();
          full.arrive_expect(Shared::kQBytes);
#pragma unroll
          for (int slab = 0; slab < Shared::kSlabs; ++slab) {
            ptx::load_box(shared.q[q_ring.slot][slab], &p.q, full, slab * kSlabColumns, row, head,
                          item.batch);
          }
          if constexpr (C.has(kBiasTiles)) {
            load_bias_tile(p, shared, q_ring.slot,
                           BiasPlace(p.scores.bias, item.key_tile, row, head, item.batch));
          }
          ptx::load_bytes(
              shared.stats[q_ring.slot],
              p.stats + static_cast<int64_t>(step.row_tile) * (kBackwardRows * kRowStats),
              Shared::kStatBytes, full);
          if constexpr (C.reads_rows()) {
            ptx::load_bytes(
                shared.row_numbers[q_ring.slot],
                p.row_numbers + static_cast<int64_t>(step.row_tile) * (2 * kBackwardRows),
                Shared::kNumberBytes, full);
          }
        }
        q_ring.next();
        sent_ring.next();

        shared.out_grad_empty[o_ring.slot].wait(o_ring.parity ^ 1);
        if (lane == 0) {
          ptx::Barrier& full = shared.out_grad_full[o_ring.slot];
          full.arrive_expect(Shared::kOutGradBytes);
#pragma unroll
          for (int slab = 0; slab < Shared::kValueSlabs; ++slab) {
            ptx::load_box(shared.out_grad[o_ring.slot][slab], &p.out_grad, full,
                          slab * kSlabColumns, row, head, item.batch);
          }
        }
        o_ring.next();

        // Of the item before, V is in use until the last dP and K until the last dQ: Q and dO go
        // ahead of them, and V ahead of a K that has to wait for its place.
        if (!first) return;
        first = false;
        if constexpr (C.k_stages > 1) load_k(item);
        load_v(item);
        if constexpr (C.k_stages == 1) load_k(item);
      };
      Span span = {0, p.row_tiles};
      if constexpr (C.adds_keys != 0) {
        span = {item.first_tile, rules::min_of(item.first_tile + p.segment_tiles, p.row_tiles)};
      }
      for_each_row_tile<C>(p, item, place, span, lane, visit);
    }
    if (C.has_turns() && lane == 0) claimed = atomicAdd(p.next_item, 1);
    index = p.blocks + __shfl_sync(0xffffffffu, claimed, 0);
    items.next();
  }
  if constexpr (C.makes_bits()) ask_for_bits({0, -1, {0, 0}, 0}, {0, 0, 0}, nullptr);
}

}  // namespace anymask::cuda
