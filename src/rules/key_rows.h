// Which rows see a key: what keys are ordered by.
#pragma once

#include "rules/evaluate.h"

namespace anymask::rules {

// All rows that see a key lie in [first, last); last 0: none does.
struct KeyRows {
  int32_t first, last;
};

ANYMASK_RULE bool any_row_sees(const Program& program, Place place, int key, int row_begin,
                               int row_end) {
  const Tile column = {row_begin, row_end, key, key + 1};
  return (key_class(program, place, column) & kVisible) != 0;
}

// Halves the rows with the column's class over each half: about 2 log2(rows) looks.
ANYMASK_RULE KeyRows rows_that_see(const Program& program, Place place, int key) {
  if (program.q_len == 0 || !any_row_sees(program, place, key, 0, program.q_len)) {
    return {program.q_len, 0};
  }
  int low = 0, high = program.q_len;  // the first row lies in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_row_sees(program, place, key, low, middle) ? high : low) = middle;
  }
  const int first = low;
  high = program.q_len;  // and so does the last
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_row_sees(program, place, key, middle, high) ? low : high) = middle;
  }
  return {first, low + 1};
}

// What the mask heads that share order head `order_head` see of a key, together.
ANYMASK_RULE KeyRows rows_of_order(const Program& program, int batch, int order_head, int key) {
  KeyRows all = {program.q_len, 0};
  for (int i = 0; i < program.order_divisor; ++i) {
    const Place place = {batch, order_head * program.order_divisor + i};
    const KeyRows seen = rows_that_see(program, place, key);
    all = {min_of(all.first, seen.first), max_of(all.last, seen.last)};
  }
  return all;
}

// Seen keys are sorted by last row in sqrt(tiles) groups of sqrt(tiles) tiles each, rounded to the
// nearest: a tile then spans about 1 / sqrt(tiles) of the first rows and of the last rows.
ANYMASK_RULE int group_count(int seen_keys, int tile_columns) {
  const int tiles = (seen_keys + tile_columns - 1) / tile_columns;
  int groups = 1;
  while (groups * groups + groups < tiles) ++groups;
  return groups;
}

}  // namespace anymask::rules
