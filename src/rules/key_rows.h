// Which rows see a key: what keys are ordered by.
#pragma once

#include "rules/evaluate.h"

namespace anymask::rules {

// Rows [first, last). No rows: last is 0 and first is behind the last row.
struct KeyRows {
  int32_t first, last;
};

// A key's column from a distance: all rows that see the key lie in `visible`, all that do not in
// `hidden`, as tightly as `&`, `|` and `~` of such bounds can tell.
struct ColumnRows {
  KeyRows visible, hidden;
};

inline constexpr KeyRows kNoRows = {0x7fffffff, 0};

ANYMASK_RULE constexpr KeyRows rows_between(int begin, int end) {
  return begin < end ? KeyRows{begin, end} : kNoRows;
}
ANYMASK_RULE constexpr KeyRows rows_of_both(KeyRows a, KeyRows b) {
  return rows_between(max_of(a.first, b.first), min_of(a.last, b.last));
}
ANYMASK_RULE constexpr KeyRows rows_of_either(KeyRows a, KeyRows b) {
  return {min_of(a.first, b.first), max_of(a.last, b.last)};
}

struct JoinColumnRows {
  using Value = ColumnRows;
  ANYMASK_RULE static Value complement(Value a) { return {a.hidden, a.visible}; }
  ANYMASK_RULE static Value both(Value a, Value b) {
    return {rows_of_both(a.visible, b.visible), rows_of_either(a.hidden, b.hidden)};
  }
  ANYMASK_RULE static Value either(Value a, Value b) {
    return {rows_of_either(a.visible, b.visible), rows_of_both(a.hidden, b.hidden)};
  }
};

// ---- leaves -------------------------------------------------------------------------------------

// A column that the rows of one run see, and the others do not.
ANYMASK_RULE ColumnRows rows_of_run(int begin, int end, int q_len) {
  const KeyRows inside = rows_between(max_of(begin, 0), min_of(end, q_len));
  if (inside.last == 0) return {kNoRows, rows_between(0, q_len)};
  return {inside, rows_of_either(rows_between(0, inside.first), rows_between(inside.last, q_len))};
}

ANYMASK_RULE ColumnRows intervals_rows(const Node& node, Place place, int column, int q_len) {
  const MaskedRuns runs = masked_runs(node, place, column);
  const auto hidden = [q_len](int begin, int end) {
    return rows_between(max_of(begin, 0), min_of(end, q_len));
  };
  // From both ends through whichever run holds the row: 1, 2, 1 covers either order.
  int first = 0, last = q_len;
  for (int i = 0; i < 2; ++i) {
    if (runs.begin1 <= first) first = max_of(first, runs.end1);
    if (runs.begin2 <= first) first = max_of(first, runs.end2);
    if (runs.end1 >= last) last = min_of(last, runs.begin1);
    if (runs.end2 >= last) last = min_of(last, runs.begin2);
  }
  return {rows_between(max_of(first, 0), last),
          rows_of_either(hidden(runs.begin1, runs.end1), hidden(runs.begin2, runs.end2))};
}

// Any leaf, to the word: from either end until some row sees the key and some does not.
ANYMASK_RULE ColumnRows rows_of_words(const Node& node, Place place, int column, int q_len) {
  ColumnRows all = {kNoRows, kNoRows};
  const auto look = [&](int row) {
    const KeyRows rows = {row, min_of(row + kWordRows, q_len)};
    const TileClass found =
        class_of_word(leaf_word(node, place, column, row, q_len), low_bits(q_len - row));
    if ((found & kVisible) != 0) all.visible = rows_of_either(all.visible, rows);
    if ((found & kHidden) != 0) all.hidden = rows_of_either(all.hidden, rows);
    return found;
  };
  int begin = 0, end = (q_len + kWordRows - 1) / kWordRows * kWordRows;
  for (TileClass seen = 0; begin < end && seen != kSome; begin += kWordRows) seen |= look(begin);
  for (TileClass seen = 0; begin < end && seen != kSome; end -= kWordRows) {
    seen |= look(end - kWordRows);
  }
  return all;
}

ANYMASK_RULE ColumnRows leaf_rows(const Node& node, Place place, int column, int q_len) {
  switch (node.op) {
    case Op::kBand:
      return rows_of_run(column - node.hi, column - node.lo + 1, q_len);
    case Op::kIntervals:
      return intervals_rows(node, place, column, q_len);
    case Op::kSegments: {
      const Segment segment = segment_of(node, place, column);
      return rows_of_run(segment.begin, segment.end, q_len);
    }
    case Op::kConstant:
    case Op::kPrefix:
      return rows_of_run(0, leaf_word(node, place, column, 0, q_len) != 0 ? q_len : 0, q_len);
    default:
      return rows_of_words(node, place, column, q_len);
  }
}

// ---- programs -----------------------------------------------------------------------------------

// What the mask heads that share order head `order_head` see of a key, together.
ANYMASK_RULE KeyRows rows_of_order(const Program& program, int batch, int order_head, int key) {
  KeyRows all = kNoRows;
  for (int i = 0; i < program.order_divisor; ++i) {
    const Place place = {batch, order_head * program.order_divisor + i};
    const ColumnRows rows = evaluate<JoinColumnRows>(
        program, [&](const Node& node) { return leaf_rows(node, place, key, program.q_len); });
    all = rows_of_either(all, rows.visible);
  }
  return {min_of(all.first, program.q_len), all.last};
}

// ---- order --------------------------------------------------------------------------------------
//
// Keys that no row sees come last, as they come. The others are sorted by first row, equal ones as
// they come, and cut into groups of whole tiles. A group is halved at the whole tile at or before
// its middle by whichever of first and last row spreads wider, and so are its halves, down to
// single tiles, whose keys are sorted by what would have halved them. Of the pairs in visited tiles
// (128 keys x 192 rows) so many are allowed: the best 1024 of 32768 keys 70%, random eviction of
// 8192 83%. Groups by first row of the square root of the tiles, each sorted by last row, had 50%
// and 83%; along a Hilbert curve it is 65% and 80%.

// Keys of a group at most. Groups exist so that a block on a GPU holds one; 2048 cost 2 of the 70%.
inline constexpr int kGroupKeys = 4096;

ANYMASK_RULE int tile_count(int keys, int tile_columns) {
  return (keys + tile_columns - 1) / tile_columns;
}

ANYMASK_RULE int group_count(int seen_keys, int tile_columns) {
  return tile_count(tile_count(seen_keys, tile_columns), kGroupKeys / tile_columns);
}

// Group `group` starts at this position; the group behind the last one at seen_keys.
ANYMASK_RULE int group_begin(int seen_keys, int tile_columns, int group) {
  const int64_t tiles = tile_count(seen_keys, tile_columns);
  const int64_t tile = tiles * group / group_count(seen_keys, tile_columns);
  return tile == tiles ? seen_keys : static_cast<int>(tile * tile_columns);
}

// The first tile of the second half.
ANYMASK_RULE int middle_tile(int begin, int end) { return begin + (end - begin) / 2; }

// Whether a set of keys is halved or sorted by first row, else by last row, equal ones by first
// row; given its least and its greatest rows.
ANYMASK_RULE bool halves_by_first(KeyRows least, KeyRows greatest) {
  return greatest.first - least.first >= greatest.last - least.last;
}

}  // namespace anymask::rules
