// Mask bits of partial tiles: made by idle warps of the producer warpgroup, read by math warps.
//
// The rules give a word of 32 rows for one column; a math thread wants, for one row, the bits of
// the columns it holds. So a warp evaluates 32 columns (lane = column) and transposes 32 x 32 bits
// with five shuffles. The columns of one transpose are those that quad lane `q` holds among 128:
// 8k + 2q and 8k + 2q + 1, in the order of its accumulators.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/schedule.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// Lane l holds word l; afterwards bit c of lane r's word is bit r of what lane c held.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t word, int lane) {
  constexpr uint32_t kLow[5] = {0x0000ffffu, 0x00ff00ffu, 0x0f0f0f0fu, 0x33333333u, 0x55555555u};
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int distance = 16 >> step;
    const uint32_t low = kLow[step];
    const uint32_t other = ptx::shuffle_xor(word, distance);
    word = (lane & distance) == 0 ? (word & low) | ((other & low) << distance)
                                  : (word & ~low) | ((other >> distance) & low);
  }
  return word;
}

// ---- one column ------------------------------------------------------------------------------------

// What a recipe says of one column: rows [begin, end) less two masked runs, and a column of words.
struct ColumnRuns {
  int begin, end;
  rules::MaskedRuns masked;
  const uint32_t* words;

  __device__ __forceinline__ uint32_t word(int first_row, int64_t word_stride) const {
    const uint32_t seen = ptx::ones_from(begin - first_row) & ~ptx::ones_from(end - first_row);
    const uint32_t hidden1 =
        ptx::ones_from(masked.begin1 - first_row) & ~ptx::ones_from(masked.end1 - first_row);
    const uint32_t hidden2 =
        ptx::ones_from(masked.begin2 - first_row) & ~ptx::ones_from(masked.end2 - first_row);
    const uint32_t result = seen & ~hidden1 & ~hidden2;
    return words == nullptr ? result : result & words[(first_row / 32) * word_stride];
  }
};

__device__ __forceinline__ ColumnRuns column_runs(const ForwardParams& p, rules::Place place,
                                                  int key) {
  const RunRecipe& recipe = p.recipe;
  ColumnRuns runs{key - recipe.band_hi, key - recipe.band_lo + 1, {0, 0, 0, 0}, nullptr};
  if (recipe.intervals >= 0) {
    runs.masked = rules::masked_runs(p.program.nodes[recipe.intervals], place, key);
  }
  if (recipe.segments >= 0) {
    const rules::Segment segment =
        rules::segment_of(p.program.nodes[recipe.segments], place, key);
    runs.begin = rules::max_of(runs.begin, segment.begin);
    runs.end = rules::min_of(runs.end, segment.end);
  }
  if (recipe.prefix >= 0 &&
      key >= rules::prefix_length(p.program.nodes[recipe.prefix], place)) {
    runs.end = runs.begin;
  }
  if (recipe.bits >= 0) {
    const rules::Node& node = p.program.nodes[recipe.bits];
    runs.words = rules::array_at<uint32_t>(node.columns, place) +
                 key * node.columns.column_stride;
  }
  return runs;
}

// ---- one strip: 64 rows x the 32 columns of quad lane q ------------------------------------------------

// `upper`, `lower`: the words of this lane's column, rows first_row.. and first_row + 32... Stores
// the transposed words and the class byte.
__device__ __forceinline__ void store_strip(uint32_t upper, uint32_t lower, bool in_tile,
                                            int rows_left, int lane, uint32_t* to,
                                            uint8_t* strip_class) {
  // Rows that do not exist are neither visible nor hidden; nor are lanes without a column.
  const uint32_t upper_rows = ~ptx::ones_from(rows_left);
  const uint32_t lower_rows = ~ptx::ones_from(rows_left - 32);
  const bool any_visible =
      __any_sync(0xffffffffu, ((upper & upper_rows) | (lower & lower_rows)) != 0);
  const bool any_hidden = __any_sync(
      0xffffffffu, in_tile && ((~upper & upper_rows) | (~lower & lower_rows)) != 0);
#ifdef FAKE
  if (false) {
#else
  if (any_visible && any_hidden) {
#endif
    upper = transpose_bits(upper, lane);
    lower = transpose_bits(lower, lane);
  } else {
    upper = lower = any_visible ? 0xffffffffu : 0;
  }
  to[lane * 4] = upper;
  to[(lane + 32) * 4] = lower;
  if (lane == 0) *strip_class = (any_visible ? 1 : 0) | (any_hidden ? 2 : 0);
}

// ---- the story of a bit-making warp, `index` of kBitWarps ------------------------------------------------

template <ForwardConfig C>
__device__ __forceinline__ void make_bits(const ForwardParams& p, ForwardShared<C>& shared,
                                          int index, int lane) {
  Ring<kItemSlots> items;
  Ring<C.bit_slots> slots;
  int turn = 0;  // whose turn the next quad lane is
  for (;; items.next()) {
    shared.item_full[items.slot].wait(items.parity);
    const Item item = shared.items[items.slot];
    __syncwarp();
    if (lane == 0) shared.item_empty[items.slot].arrive();
    if (item.count < 0) break;
    const rules::Place place = mask_place(p, item.batch, item.head);
    const int item_row = item.row_tile * C.rows();

    for_each_tile<true>(p, item, lane, [&](int tile, uint32_t) {
#pragma unroll 1
      for (int part = 0; part < 4 * C.word_groups(); ++part) {
        const bool mine = turn == index;
        turn = turn == kBitWarps - 1 ? 0 : turn + 1;
        if (!mine) continue;
        const int q = part & 3, group = part >> 2;
        const int column_in_tile = group * 128 + 8 * (lane / 2) + 2 * q + (lane & 1);
        const bool in_tile = column_in_tile < C.columns;
        const int column = tile * C.columns + column_in_tile;
        const bool exists = in_tile && column < p.kv_len;
        ColumnRuns runs{};
        int64_t word_stride = 0;
        if constexpr (C.machine == 0) {
#ifndef FAKE
          if (exists) runs = column_runs(p, place, rules::key_at(p.program, place, column));
#endif
          if (p.recipe.bits >= 0) word_stride = p.program.nodes[p.recipe.bits].columns.row_stride;
        }
#pragma unroll 1
        for (int w = 0; w < C.warpgroups; ++w) {
          const int first_row = item_row + 64 * w;
          const int rows_left = p.q_len - first_row;
          uint32_t upper = 0, lower = 0;
#ifdef FAKE
          upper = lower = 0x7fffffff;
          if (false) {
#endif
          if constexpr (C.machine == 0) {
            if (exists && rows_left > 0) upper = runs.word(first_row, word_stride);
            if (exists && rows_left > 32) lower = runs.word(first_row + 32, word_stride);
          } else if (exists) {
#pragma unroll 1
            for (int half = 0; half < 2 && rows_left > 32 * half; ++half) {
              upper = lower;
              lower = rules::column_word(p.program, place, column, first_row + 32 * half);
            }
            if (rows_left <= 32) upper = lower;
          }
#ifdef FAKE
          }
#endif
          shared.bits_empty[slots.slot][w].wait(slots.parity ^ 1);
          store_strip(upper, lower, in_tile, rows_left, lane,
                      &shared.bits[slots.slot][w][group][0][q],
                      reinterpret_cast<uint8_t*>(&shared.classes[slots.slot][w][group]) + q);
          __syncwarp();
          if (lane == 0) shared.bits_full[slots.slot][w].arrive();
        }
      }
      slots.next();
    });
  }
}

}  // namespace anymask::cuda
