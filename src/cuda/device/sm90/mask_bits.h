// Mask bits of partial tiles: made by idle warps of the producer warpgroup, read by math warps. Or,
// where the plan has them, copied.
//
// The rules give a word of 32 rows for one column; a math thread wants, for one row, the bits of
// the columns it holds. So a warp evaluates 32 columns (lane = column) and transposes 32 x 32 bits
// with five shuffles. The columns of one transpose are those that quad lane `q` holds among 128:
// 8k + 2q and 8k + 2q + 1, in the order of its accumulators.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/rows_of_id.h"
#include "cuda/device/sm90/dropout_bits.h"
#include "cuda/device/sm90/schedule.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// Lane l holds words l of two matrices; afterwards bit c of lane r's word is bit r of what lane c
// held. Exchanges halves, bytes, nibbles, pairs and bits with the lane 16, 8, 4, 2 and 1 away: two
// instructions for the first two (a byte permutation picks), three for the others (rotate, merge).
// Two at a time, because one shuffle alone is a long wait.
__device__ __forceinline__ void transpose_bits(uint32_t& a, uint32_t& b, int lane) {
  const uint32_t halves = (lane & 16) == 0 ? 0x5410u : 0x3276u;
  uint32_t other_a = ptx::shuffle_xor(a, 16), other_b = ptx::shuffle_xor(b, 16);
  a = __byte_perm(a, other_a, halves);
  b = __byte_perm(b, other_b, halves);
  const uint32_t bytes = (lane & 8) == 0 ? 0x6240u : 0x3715u;
  other_a = ptx::shuffle_xor(a, 8);
  other_b = ptx::shuffle_xor(b, 8);
  a = __byte_perm(a, other_a, bytes);
  b = __byte_perm(b, other_b, bytes);
  constexpr uint32_t kLow[3] = {0x0f0f0f0fu, 0x33333333u, 0x55555555u};
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int distance = 4 >> step;
    const bool upper = (lane & distance) != 0;
    const uint32_t keep = upper ? ~kLow[step] : kLow[step];
    const int turn = upper ? 32 - distance : distance;
    other_a = ptx::shuffle_xor(a, distance);
    other_b = ptx::shuffle_xor(b, distance);
    a = (a & keep) | (__funnelshift_l(other_a, other_a, turn) & ~keep);
    b = (b & keep) | (__funnelshift_l(other_b, other_b, turn) & ~keep);
  }
}

// ---- one column ---------------------------------------------------------------------------------

// What a recipe says of one column: rows [begin, end) less two masked runs.
struct ColumnRuns {
  int begin, end;
  int begin1, end1, begin2, end2;
};

// How many masked runs a recipe's columns have that [begin, end) cannot take in.
__device__ __forceinline__ int holes_of(const ForwardParams& p) {
  if (p.recipe.intervals < 0) return 0;
  switch (static_cast<rules::IntervalForm>(p.program.nodes[p.recipe.intervals].flag)) {
    case rules::IntervalForm::kFrom:
    case rules::IntervalForm::kOutside:
      return 0;
    case rules::IntervalForm::kRun:
      return 1;
    default:
      return 2;
  }
}

// Under MaskPath::kRuns there are no masked runs.
template <MaskPath kPath>
__device__ __forceinline__ ColumnRuns column_runs(const ForwardParams& p,
                                                  const RecipeArrays& arrays, int key) {
  const RunRecipe& recipe = p.recipe;
  ColumnRuns runs{key - recipe.band_hi, key - recipe.band_lo + 1, 0, 0, 0, 0};
  if (recipe.intervals >= 0) {
    const rules::Array& array = p.program.nodes[recipe.intervals].columns;
    const int32_t* row = arrays.intervals + key * array.row_stride;
    const int64_t step = array.column_stride;
    const auto form = static_cast<rules::IntervalForm>(p.program.nodes[recipe.intervals].flag);
    switch (form) {
      case rules::IntervalForm::kFrom:
        runs.end = rules::min_of(runs.end, row[0]);
        break;
      case rules::IntervalForm::kOutside:
        runs.end = rules::min_of(runs.end, row[0]);
        runs.begin = rules::max_of(runs.begin, row[step]);
        break;
      default:
        if constexpr (kPath == MaskPath::kRuns) break;
        runs.begin1 = row[0];
        runs.end1 = row[step];
        if (form == rules::IntervalForm::kRun) break;
        runs.begin2 = row[2 * step];
        runs.end2 = row[3 * step];
    }
  }
  if (recipe.segments >= 0) {
    rules::Node node = p.program.nodes[recipe.segments];
    node.columns.data = arrays.segments;
    const rules::Segment segment = rules::segment_of(node, {0, 0}, key);
    runs.begin = rules::max_of(runs.begin, segment.begin);
    runs.end = rules::min_of(runs.end, segment.end);
  }
  if (key >= arrays.prefix) runs.end = runs.begin;
  return runs;
}

// An integer of an array that begins at `data`.
__device__ __forceinline__ int64_t integer_of(const rules::Array& array, const void* data,
                                              int64_t offset) {
  return array.bytes == 8 ? static_cast<const int64_t*>(data)[offset]
                          : static_cast<const int32_t*>(data)[offset];
}

// The words of a column for kWords x 32 rows from first_row. Bits of rows that do not exist are
// arbitrary: they cost a mask that was not needed, never a wrong result.
template <MaskPath kPath, int kWords>
__device__ __forceinline__ void column_words(const ForwardParams& p, const RecipeArrays& arrays,
                                             int key, int first_row, bool exists, int lane,
                                             uint32_t (&words)[kWords]) {
  ColumnRuns runs{};
  if (exists) runs = column_runs<kPath>(p, arrays, key);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int row = first_row + 32 * i;
    words[i] = ptx::ones_between(runs.begin - row, runs.end - row);
  }
  if constexpr (kPath == MaskPath::kRuns) return;
  // A loop that runs zero times for most masks: the compiler must not make predicated code of it.
  const int holes = holes_of(p);
#pragma unroll 1
  for (int hole = 0; hole < holes; ++hole) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int row = first_row + 32 * i;
      words[i] &= ~ptx::ones_between(runs.begin1 - row, runs.end1 - row);
    }
    runs.begin1 = runs.begin2;
    runs.end1 = runs.end2;
  }
  if (p.recipe.bits >= 0 && exists) {
    const rules::Array& array = p.program.nodes[p.recipe.bits].columns;
    const uint32_t* word =
        arrays.bits + (first_row / 32) * array.row_stride + key * array.column_stride;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (first_row + 32 * i < p.q_len) words[i] &= *word;
      word += array.row_stride;
    }
  }
  if (p.recipe.ids >= 0) {
    const rules::Node& node = p.program.nodes[p.recipe.ids];
    const int64_t column_id =
        exists ? integer_of(node.columns, arrays.column_ids, key * node.columns.row_stride) : 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int row = first_row + 32 * i + lane;
      const int64_t row_id =
          row < p.q_len ? integer_of(node.rows, arrays.row_ids, row * node.rows.row_stride) : 0;
      words[i] &= rows_of_id(row_id, column_id, ~ptx::ones_from(p.q_len - first_row - 32 * i),
                             node.flag != 0);
    }
  }
}

// ---- one column of any program ------------------------------------------------------------------

// A leaf's words of a column. What does not depend on the rows is found once.
template <int kWords>
__device__ __forceinline__ void leaf_words(const rules::Node& node, rules::Place place, int key,
                                           int first_row, int q_len, uint32_t (&words)[kWords]) {
  switch (node.op) {
    case rules::Op::kBand:
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int row = first_row + 32 * i;
        words[i] = ptx::ones_between(key - node.hi - row, key - node.lo + 1 - row);
      }
      break;
    case rules::Op::kIntervals: {
      const rules::MaskedRuns runs = rules::masked_runs(node, place, key);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int row = first_row + 32 * i;
        words[i] = ~(ptx::ones_between(runs.begin1 - row, runs.end1 - row) |
                     ptx::ones_between(runs.begin2 - row, runs.end2 - row));
      }
      break;
    }
    case rules::Op::kPrefix:
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = rules::prefix_word(node, place, key);
      break;
    default:
#pragma unroll 1
      for (int i = 0; i < kWords; ++i) {
        const int row = first_row + 32 * i;
        words[i] = row < q_len ? rules::leaf_word(node, place, key, row, q_len) : 0;
      }
  }
}

// The postfix machine for all words of a column at once. Its stack is in local memory: there are
// no registers for it, and every word of a leaf is one store.
template <int kWords>
__device__ __forceinline__ void machine_words(const ForwardParams& p, rules::Place place, int key,
                                              int first_row, uint32_t (&words)[kWords]) {
  uint32_t stack[rules::kMaxDepth][kWords];
  int depth = 0;
#pragma unroll 1
  for (int n = 0; n < p.program.count; ++n) {
    const rules::Node& node = p.program.nodes[n];
    if (node.op == rules::Op::kNot) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) stack[depth - 1][i] = ~stack[depth - 1][i];
    } else if (node.op == rules::Op::kAnd || node.op == rules::Op::kOr) {
      const bool both = node.op == rules::Op::kAnd;
      --depth;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t a = stack[depth - 1][i], b = stack[depth][i];
        stack[depth - 1][i] = both ? a & b : a | b;
      }
    } else {
      leaf_words(node, place, key, first_row, p.q_len, stack[depth++]);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = stack[0][i];
}

// ---- one strip: 64 rows x the 32 columns of quad lane q -----------------------------------------

// `upper`, `lower`: the words of this lane's column, for the strip's first and last 32 rows. Stores
// the transposed words and the class byte. has_column: lanes beyond the tile's last column are
// neither visible nor hidden.
__device__ __forceinline__ void store_strip(uint32_t upper, uint32_t lower, bool has_column,
                                            int lane, uint32_t* to, uint8_t* strip_class) {
  const uint32_t visible = __ballot_sync(0xffffffffu, (upper | lower) != 0);
  const uint32_t hidden = __ballot_sync(0xffffffffu, has_column && (upper & lower) != 0xffffffffu);
  if (visible != 0 && hidden != 0) {
    transpose_bits(upper, lower, lane);
  } else {
    upper = lower = visible != 0 ? 0xffffffffu : 0;
  }
  to[lane * 4] = upper;
  to[(lane + 32) * 4] = lower;
  // Lanes 0..15 have columns among the group's first 64. Each of lanes 0..3 knows one bit.
  const uint32_t mine = ((lane & 2) == 0 ? visible : hidden) >> ((lane & 1) * 16);
  const uint32_t bits = __ballot_sync(0xffffffffu, (mine & 0xffff) != 0);
  if (lane == 0) *strip_class = static_cast<uint8_t>(bits & 15);
}

// ---- key biases ---------------------------------------------------------------------------------

// What is added to the scores of the key at `position`; `first`: the number of the caller's key 0.
template <ForwardConfig C>
__device__ __forceinline__ float key_bias_at(const ForwardParams& p, const void* first,
                                             const int32_t* order, int position) {
  if (position >= p.kv_len) return 0.0f;
  const int64_t key = order != nullptr ? order[position] : position;
  const Numbers& numbers = p.scores.key_bias;
  return number_at<C.half != 0>(numbers, first, key * numbers.key_stride) * p.scores.bias_factor;
}

// ---- baked tiles --------------------------------------------------------------------------------

// Announces the bytes of a tile's bits to the slot's barrier, which still waits for the caller's
// arrival, and copies them.
template <ForwardConfig C>
__device__ __forceinline__ void copy_bits(const ForwardParams& p, const Item& item, int tile,
                                          TileBits<C>& to, ptx::Barrier& full) {
  constexpr int kWords = plan::row_tile_words(C.tile());
  const int64_t row = map_row(p, mask_place(p, item.batch, item.head), item.row_tile);
  full.expect(4 * kWords);
  ptx::load_bytes(&to, p.map.baked + (row * p.map.inner_tiles + tile) * kWords, 4 * kWords, full);
}

// ---- a tile's words, by all bit-making warps together -------------------------------------------

// piece: of the tile's first, the next one that is this warp's; then of the next tile's.
template <ForwardConfig C, typename Shared>
__device__ __forceinline__ void make_tile_bits(const ForwardParams& p, Shared& shared,
                                               const RecipeArrays& arrays, const Item& item,
                                               int tile, const Ring<C.bit_slots>& slots, int& piece,
                                               int lane) {
  constexpr int kPieces = 4 * C.word_groups();  // 32 columns each
  const int first_row = item.row_tile * C.rows();
#pragma unroll 1
  for (; piece < kPieces; piece += kBitWarps) {
    const int q = piece & 3, group = piece >> 2;
    const int in_tile = group * 128 + 8 * (lane / 2) + 2 * q + (lane & 1);
    const bool has_column = C.columns % 128 == 0 || in_tile < C.columns;
    const int column = tile * C.columns + in_tile;
    const bool exists = has_column && column < p.kv_len;
    uint32_t words[2 * C.strips()] = {};
    if constexpr (C.masks() != MaskPath::kMachine) {
      int key = column;
      if (exists && arrays.key_order != nullptr) key = arrays.key_order[column];
      column_words<C.masks()>(p, arrays, key, first_row, exists, lane, words);
    } else if (exists) {
      const rules::Place place = mask_place(p, item.batch, item.head);
      machine_words(p, place, rules::key_at(p.program, place, column), first_row, words);
    }
    if constexpr (C.cuts != 0) {
      if (p.one_mask_row != 0) {
        const uint32_t all = 0u - (words[0] & 1u);
#pragma unroll
        for (uint32_t& word : words) word = all;
      }
    }
    if constexpr (!C.every_tile()) shared.bits_empty[slots.slot].wait(slots.parity ^ 1);
#pragma unroll
    for (int w = 0; w < C.strips(); ++w) {
      store_strip(words[2 * w], words[2 * w + 1], has_column, lane,
                  &shared.bits[slots.slot].words[w][group][0][q],
                  reinterpret_cast<uint8_t*>(&shared.bits[slots.slot].classes[w][group]) + q);
    }
    if constexpr (!C.every_tile()) {
      shared.bits_full[slots.slot].arrive_warp(lane);
    }
  }
  piece -= kPieces;
}

// ---- the story of a bit-making warp, `index` of kFillWarps --------------------------------------

template <ForwardConfig C>
__device__ __forceinline__ void make_bits(const ForwardParams& p, ForwardShared<C>& shared,
                                          int index, int lane) {
  Ring<kItemSlots> items;
  Ring<C.bit_slots> slots;
  int piece = index;  // the next one that is this warp's, counted from the tile's first
  for (;; items.next()) {
    shared.item_full[items.slot].wait(items.parity);
    const Item item = shared.items[items.slot];
    if (item.count < 0) break;
    const RecipeArrays& arrays = shared.arrays[items.slot];
    const int item_row = item.row_tile * C.rows();
    const int32_t* order = nullptr;
    const void* key_bias = nullptr;
    rules::Dropout dropout{};
    if constexpr (C.every_tile())
      order = key_order_of(p.program, mask_place(p, item.batch, item.head));
    if constexpr (C.has(kKeyBias)) {
      key_bias = numbers_of(p.scores.key_bias, item.batch, item.head, 0);
    }
    if constexpr (C.has(kDropout)) dropout = dropout_of(p.scores, item.batch, item.head);

    int first_tile = 0;
    if constexpr (C.cuts != 0) first_tile = shared.parts[items.slot].first_tile;
    TileWalker<C> walker(p, item, mask_place(p, item.batch, item.head), first_tile);
#pragma unroll 1
    for (int i = 0; i < item.count; ++i) {
      walker.next();
      if (!C.every_tile() && !walker.is_partial) continue;
      if constexpr (C.whole_slots()) shared.bits_empty[slots.slot].wait(slots.parity ^ 1);
      if constexpr (C.baked()) {
        if (walker.is_partial && index == 0 && lane == 0) {
          copy_bits(p, item, walker.tile, shared.bits[slots.slot], shared.bits_full[slots.slot]);
        }
      } else if (walker.is_partial) {
        make_tile_bits<C>(p, shared, arrays, item, walker.tile, slots, piece, lane);
      }
      const int first = C.every_tile() ? ptx::uniform(walker.tile) * C.columns : 0;
      if constexpr (C.has(kKeyBias)) {
#pragma unroll 1
        for (int in_tile = 32 * index + lane; in_tile < C.columns; in_tile += 32 * kBitWarps) {
          shared.key_bias[slots.slot][in_tile] =
              key_bias_at<C>(p, key_bias, order, first + in_tile);
        }
      }
      if constexpr (C.has(kDropout)) {
        make_kept<C>(p, dropout, order, item_row, first, index, lane, shared.kept[slots.slot]);
      }
      if constexpr (C.whole_slots()) {
        shared.bits_full[slots.slot].arrive_warp(lane);
      }
      slots.next();
    }
    shared.item_empty[items.slot].arrive_warp(lane);
  }
}

}  // namespace anymask::cuda
