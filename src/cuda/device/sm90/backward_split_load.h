// The loading warp of the Hopper backward kernel that makes dQ apart from dK and dV.
//
// An item is a tile of 128 positions of a kv head. As rows they get dQ, under one query head after
// the other; then, as keys, dK and dV. What a tile has itself, Q and dO as well as K and V, is
// loaded once for both.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_split_shared.h"
#include "cuda/device/sm90/backward_split_stats.h"
#include "cuda/device/sm90/schedule.h"

namespace anymask::cuda {

template <SplitConfig C>
struct SplitLoader {
  using Shared = SplitShared<C>;

  const SplitParams& p;
  Shared& shared;
  const int lane;

  Ring<kPhaseSlots> phases;
  Ring<kRequestSlots> requests;
  SlotQueue slots;
  uint32_t parity = 0;  // of slot_empty, a bit each

  // 64 rows of Q and dO with their statistics, or 64 keys of K and V. Returns their slot.
  template <bool kRows>
  __device__ __forceinline__ int load(int first, int head, int batch, int row_tile, int about) {
    // Uniform, as what says where to load from: else each copy sits in a loop over the lanes.
    const int slot = ptx::uniform(slots.take());
    shared.slot_empty[slot].wait(((parity >> slot) & 1) ^ 1);
    parity ^= 1u << slot;
    first = ptx::uniform(first);
    if (ptx::elect_one()) {
      shared.about[slot] = about;
      ptx::Barrier& full = shared.slot_full[slot];
      full.arrive_expect(Shared::kPairBytes + (kRows ? Shared::kStatBytes : 0));
      const TensorMapBytes& inner = kRows ? p.keys.q : p.rows.k;
      const TensorMapBytes& values = kRows ? p.keys.out_grad : p.rows.v;
#pragma unroll
      for (int slab = 0; slab < Shared::kSlabs; ++slab) {
        ptx::load_box(shared.inner[slot][slab], &inner, full, slab * kSlabColumns, first, head,
                      batch);
      }
#pragma unroll
      for (int slab = 0; slab < Shared::kValueSlabs; ++slab) {
        ptx::load_box(shared.values[slot][slab], &values, full, slab * kSlabColumns, first, head,
                      batch);
      }
      if constexpr (kRows) {
        ptx::load_bytes(shared.stats[slot],
                        p.keys.stats + static_cast<int64_t>(row_tile) * (kBackwardRows * kRowStats),
                        Shared::kStatBytes, full);
      }
    }
    return slot;
  }

  // A tile's keys to two slots, 8 bits each, which are free again at once, or not.
  __device__ __forceinline__ int load_keys(int tile, int kv_head, int batch, int about, bool free) {
    int both = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int slot = load<false>(tile * Shared::kColumns + 64 * half, kv_head, batch, 0, about);
      both |= slot << 8 * half;
      if (free) slots.put(slot);
    }
    return both;
  }

  // row_tile: of the head's; partial: of its keys' step.
  __device__ __forceinline__ int load_rows(int row_tile, int head, int batch, int partial) {
    // Behind the last row there are no statistics, and nobody looks at them.
    const int known = rules::min_of(row_tile, p.keys.row_tiles - 1);
    return load<true>(row_tile * kBackwardRows, head, batch,
                      (batch * p.keys.q_heads + head) * p.keys.row_tiles + known,
                      row_tile << kPartialBits | partial);
  }

  __device__ __forceinline__ void publish(const SplitPhase& phase, const SplitTile& tile) {
    shared.phase_empty[phases.slot].wait(phases.parity ^ 1);
    if (lane == 0) {
      shared.phases[phases.slot] = PublishedPhase(phase, tile);
      shared.phase_full[phases.slot].arrive();
    }
    phases.next();
  }

  __device__ __forceinline__ void ask(const SplitRequest& request) {
    shared.request_empty[requests.slot].wait(requests.parity ^ 1);
    if (lane == 0) {
      shared.requests[requests.slot] = request;
      shared.request_full[requests.slot].arrive();
    }
    requests.next();
  }

  // What a tile's own keys meet of its own two row tiles.
  struct OwnRows {
    int met;      // a bit each
    int partial;  // kPartialBits each; 0: all pairs are visible

    __device__ __forceinline__ int partial_of(int i) const {
      return partial >> (i * kPartialBits) & ((1 << kPartialBits) - 1);
    }
  };

  __device__ __forceinline__ OwnRows own_rows_of(int tile, rules::Place place) {
    const plan::TileMap& map = p.keys.columns;
    if (tile >= map.outer_tiles || 2 * tile >= p.keys.row_tiles) return {0, 0};
    const int64_t word = map_row(p.keys, map, place, tile) * map.words + tile / 16;
    const int shift = 2 * tile % 32;
    const int met = (map.visible[word] >> shift) & 3;
    const int partial = (map.hidden[word] >> shift) & met;
    // The first that is partial brings the keys' runs.
    const int second = (partial & 2) == 0 ? 0 : partial == 3 ? 1 : 2;
    return {met, 2 * (partial & 1) | second << kPartialBits};
  }

  // Whether a tile's rows see its own keys.
  __device__ __forceinline__ bool sees_itself(int tile, rules::Place place) {
    const plan::TileMap& map = p.rows.map;
    const int row = 2 * tile;
    const int64_t first = map_row(p.rows, place, row);
    const uint32_t* word = map.visible + first * map.words + tile / 32;
    uint32_t tiles = word[0];
    if (row + 1 < map.outer_tiles) tiles |= word[map.words];
    return tile < map.inner_tiles && (tiles >> (tile % 32) & 1) != 0;
  }

  // A tile's slots that stay for its keys' turn.
  struct Stays {
    int rows = 0;  // two slots, 8 bits each
    int keys = 0;  // likewise
    int rows_stay = 0;
    bool keys_stay = false;
  };

  // dQ of a tile's rows under `head`. What the tile's keys meet of them stays for `own.met`, and so
  // do the keys where keys_wait.
  __device__ __forceinline__ Stays rows(int tile, int batch, int head, int kv_head,
                                        rules::Place place, const OwnRows& own, bool keys_wait) {
    const int row = 2 * tile;
    const Item item = {tile, batch, head,
                       count_union<C.rows().map_rows()>(p.rows, map_row(p.rows, place, row),
                                                        p.rows.map.outer_tiles - row)};
    Stays stays;
    if (item.count > 0) {
      stays.rows_stay = own.met;
      stays.keys_stay = keys_wait && sees_itself(tile, place);
    }
    publish({SplitWork::kRows, 2 * item.count, stays.rows_stay, stays.keys_stay},
            {tile, batch, head});
    if (item.count == 0) return stays;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      stays.rows |= load_rows(row + i, head, batch, own.partial_of(i)) << 8 * i;
    }

    TileWalker<C.rows()> walker(p.rows, item, place);
    bool fresh = true, own_partial = false;
#pragma unroll 1
    for (int i = 0; i <= item.count; ++i) {
      int key_tile = tile;
      bool partial = own_partial;
      if (i < item.count) {
        walker.next();
        key_tile = ptx::uniform(walker.tile);
        partial = walker.is_partial;
        if (stays.keys_stay && key_tile == tile) {  // last, so that it is still there then
          own_partial = partial;
          continue;
        }
      } else if (!stays.keys_stay) {
        break;
      }
      if (partial) {
        ask({SplitWork::kRows, item, {key_tile, 0, place, fresh}});
        fresh = false;
      }
      stays.keys = load_keys(key_tile, kv_head, batch, partial, i < item.count);
    }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      if ((stays.rows_stay >> i & 1) == 0) slots.put(stays.rows >> 8 * i & 255);
    }
    return stays;
  }

  // dK and dV of a tile's keys. `own`, `stays`: as they were for rows under the group's last head.
  __device__ __forceinline__ void keys(const BackwardItem& item, const OwnRows& own,
                                       const Stays& stays) {
    const int tile = item.key_tile, last_head = item.first_head + p.keys.group_heads - 1;
    publish({SplitWork::kKeys, item.steps, stays.rows_stay, stays.keys_stay},
            {tile, item.batch, item.kv_head});
    const int own_keys =
        stays.keys_stay ? stays.keys : load_keys(tile, item.kv_head, item.batch, 0, false);
#pragma unroll 1
    for (int head = last_head; head >= item.first_head; --head) {
      const rules::Place place = mask_place(p.keys, item.batch, head);
      bool fresh = true;
      // Returns the step's BackwardStep::partial.
      const auto prepare = [&](int row_tile, bool partial) {
        if (!partial) return 0;
        if (fresh || !Shared::kHandsOverRuns) {
          ask({SplitWork::kKeys, {0, 0, 0, 0}, {tile, row_tile, place, fresh}});
        }
        const int needed = fresh ? 2 : 1;
        fresh = false;
        return needed;
      };
      int met_begin = 0, met_end = 0;  // what has been met first
      if (head == last_head && stays.rows_stay != 0) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
          if ((stays.rows_stay >> i & 1) == 0) continue;
          prepare(2 * tile + i, own.partial_of(i) != 0);
          slots.put(stays.rows >> 8 * i & 255);
        }
        met_begin = 2 * tile;
        met_end = 2 * tile + 2;
      }
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const Span span = part == 0 ? Span{0, met_begin} : Span{met_end, p.keys.row_tiles};
        for_each_row_tile<C.keys()>(p.keys, item, place, span, lane, [&](const RowTile& met) {
          const int partial = prepare(met.tile, met.partial != 0);
          slots.put(load_rows(met.tile, head, item.batch, partial));
        });
      }
    }
    slots.put(own_keys & 255);
    slots.put(own_keys >> 8);
  }

  // Item `index`: its key tile, or tile of rows behind the last key.
  __device__ __forceinline__ BackwardItem item_of(int index) {
    const BackwardParams& k = p.keys;
    const int before_tail = k.pairs - k.tail;
    const int first_pair = rules::min_of(index / (k.chunk * p.tiles) * k.chunk, before_tail);
    const int pairs = first_pair < before_tail ? k.chunk : k.tail;
    const int rest = index - first_pair * p.tiles;
    const int rank = rest / pairs;
    const int pair = first_pair + rest - rank * pairs;
    const int batch = ptx::uniform(pair / k.kv_heads);
    BackwardItem item = {rank, batch, ptx::uniform(pair - batch * k.kv_heads), 0, 0, 0};
    item.first_head = item.kv_head * k.group_heads;
    if (rank < k.columns.outer_tiles) {
      const rules::Place place = mask_place(k, item.batch, item.first_head);
      item.key_tile = k.columns.order[map_row(k, k.columns, place, rank)];
    }
    item.key_tile = ptx::uniform(item.key_tile);
    return item;
  }

  // Row tiles that the item's keys meet, over all of the group's heads.
  __device__ __forceinline__ int steps_of(const BackwardItem& item) {
    int steps = 0;
#pragma unroll 1
    for (int i = 0; i < p.keys.group_heads; ++i) {
      const rules::Place place = mask_place(p.keys, item.batch, item.first_head + i);
      steps += p.keys.columns.count[map_row(p.keys, p.keys.columns, place, item.key_tile)];
    }
    return steps;
  }

  __device__ __forceinline__ bool has_rows(const BackwardItem& item) {
    return 2 * item.key_tile < p.keys.row_tiles;
  }

  // Until the statistics of all of a kv head's rows are there, for copies too.
  __device__ __forceinline__ void await_stats(const BackwardItem& item) {
    const int32_t* known = known_of_pair(p.keys, item.batch * p.keys.kv_heads + item.kv_head);
    while (ptx::load_acquire(known) < row_tiles_of_pair(p.keys)) __nanosleep(100);
    ptx::fence_async_global();
  }

  __device__ __forceinline__ void run() {
    int index = draw_item(p.keys.next_item, lane);
    while (index < p.keys.items) {
      BackwardItem item = item_of(index);
      await_stats(item);
      const int tile = item.key_tile;
      const bool has_keys = tile < p.keys.columns.outer_tiles;
      const int last_head = item.first_head + p.keys.group_heads - 1;
      const OwnRows own = own_rows_of(tile, mask_place(p.keys, item.batch, last_head));
      Stays stays;
      if (has_rows(item)) {
#pragma unroll 1
        for (int head = item.first_head; head <= last_head; ++head) {
          const bool last = head == last_head;
          stays = rows(tile, item.batch, head, item.kv_head, mask_place(p.keys, item.batch, head),
                       last ? own : OwnRows{0, 0}, last && has_keys);
        }
      }
      if (has_keys) {
        item.steps = steps_of(item);
        keys(item, own, stays);
      }
      // Not ahead: where there is an item for each block, those that come first would have two.
      index = draw_item(p.keys.next_item, lane);
    }
    publish({SplitWork::kNone, 0, 0, false}, {0, 0, 0});
    ask({SplitWork::kNone, {0, 0, 0, 0}, {0, 0, {0, 0}, 0}});
  }
};

}  // namespace anymask::cuda
