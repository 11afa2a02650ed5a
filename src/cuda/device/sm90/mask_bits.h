// Mask bits of partial tiles: made by idle warps of the producer warpgroup, read by math warps.
//
// The rules give a word of 32 rows for one column; a math thread wants, for one row, the bits of
// the columns it holds. So a warp evaluates 32 columns (lane = column) for 64 rows and transposes
// 32 x 32 bits with five shuffles. The columns of one transpose are those that quad lane `q` holds
// among 128: 8k + 2q and 8k + 2q + 1, in the order of its accumulators.
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

// Makes the bits of one strip (64 rows from first_row) for one quad lane and group of 128 columns.
template <ForwardConfig C>
__device__ __forceinline__ void make_strip_bits(const ForwardParams& p, rules::Place place,
                                                int first_row, int first_column, int q, int group,
                                                int lane, uint32_t (&to)[64][4],
                                                uint8_t* strip_class) {
  const int in_tile = group * 128 + 8 * (lane / 2) + 2 * q + (lane & 1);
  const int column = first_column + in_tile;
  const int rows_left = p.q_len - first_row;
  uint32_t upper = 0, lower = 0;
  if (in_tile < C.columns && column < p.kv_len) {
    if (rows_left > 0) upper = rules::column_word(p.program, place, column, first_row);
    if (rows_left > 32) lower = rules::column_word(p.program, place, column, first_row + 32);
  }
  // Rows that do not exist are neither visible nor hidden.
  const uint32_t upper_rows = rules::low_bits(rules::clamp_to(rows_left, 0, 32));
  const uint32_t lower_rows = rules::low_bits(rules::clamp_to(rows_left - 32, 0, 32));
  const bool any_visible =
      __any_sync(0xffffffffu, ((upper & upper_rows) | (lower & lower_rows)) != 0);
  const bool any_hidden = __any_sync(
      0xffffffffu,
      in_tile < C.columns && ((~upper & upper_rows) | (~lower & lower_rows)) != 0);
  if (any_visible && any_hidden) {
    upper = transpose_bits(upper, lane);
    lower = transpose_bits(lower, lane);
  } else {
    upper = lower = any_visible ? 0xffffffffu : 0;
  }
  to[lane][q] = upper;
  to[lane + 32][q] = lower;
  if (lane == 0) *strip_class = (any_visible ? 1 : 0) | (any_hidden ? 2 : 0);
}

// The story of a bit-making warp, `index` of kBitWarps.
template <ForwardConfig C>
__device__ __forceinline__ void make_bits(const ForwardParams& p, ForwardShared<C>& shared,
                                          int index, int lane) {
  Ring<kItemSlots> items;
  Ring<C.bit_slots> slots;
  int turn = 0;  // whose turn the next piece is
  for (;; items.next()) {
    shared.item_full[items.slot].wait(items.parity);
    const Item item = shared.items[items.slot];
    __syncwarp();
    if (lane == 0) shared.item_empty[items.slot].arrive();
    if (item.count < 0) break;
    const rules::Place place = mask_place(p, item.batch, item.head);

    for_each_tile<true>(p, item, lane, [&](int tile, uint32_t) {
#pragma unroll 1
      for (int w = 0; w < C.warpgroups; ++w) {
#pragma unroll 1
        for (int piece = 0; piece < 4 * C.word_groups(); ++piece) {
          const bool mine = turn == index;
          turn = turn == kBitWarps - 1 ? 0 : turn + 1;
          if (!mine) continue;
          const int q = piece & 3, group = piece >> 2;
          shared.bits_empty[slots.slot][w].wait(slots.parity ^ 1);
          make_strip_bits<C>(
              p, place, item.row_tile * C.rows() + 64 * w, tile * C.columns, q, group, lane,
              shared.bits[slots.slot][w][group],
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
