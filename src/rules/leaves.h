// The leaf rules: for each kind of mask its class over a tile and its word for a column.
//
// A new kind is two functions here, `<kind>_class` and `<kind>_word`, and a case in each of the
// two switches at the end. A class may say `some` where the truth is simpler, never the reverse.
#pragma once

#include "rules/program.h"
#include "rules/tile_class.h"

namespace anymask::rules {

// ---- reading arrays -----------------------------------------------------------------------------

template <typename T>
ANYMASK_RULE const T* array_at(const Array& array, Place place) {
  // A division costs a GPU about 25 instructions, and most masks have no use for one.
  const int head = array.head_divisor == 1 ? place.head : place.head / array.head_divisor;
  return static_cast<const T*>(array.data) + place.batch * array.batch_stride +
         head * array.head_stride;
}

ANYMASK_RULE int64_t load_integer(const Array& array, Place place, int64_t offset) {
  return array.bytes == 8 ? array_at<int64_t>(array, place)[offset]
                          : static_cast<int64_t>(array_at<int32_t>(array, place)[offset]);
}

// `sign_bits` is 1 for floating-point elements, whose -0.0 is zero too, else 0.
ANYMASK_RULE bool load_nonzero(const Array& array, Place place, int64_t offset, int sign_bits) {
  switch (array.bytes) {
    case 1:
      return array_at<uint8_t>(array, place)[offset] != 0;
    case 2:
      return static_cast<uint16_t>(array_at<uint16_t>(array, place)[offset] << sign_bits) != 0;
    case 4:
      return (array_at<uint32_t>(array, place)[offset] << sign_bits) != 0;
    default:
      return (array_at<uint64_t>(array, place)[offset] << sign_bits) != 0;
  }
}

// ---- band: lo <= column - row <= hi -------------------------------------------------------------

ANYMASK_RULE TileClass band_class(const Node& node, const Tile& tile) {
  const int least = tile.column_begin - (tile.row_end - 1);
  const int most = (tile.column_end - 1) - tile.row_begin;
  return class_of(most >= node.lo && least <= node.hi, least < node.lo || most > node.hi);
}

ANYMASK_RULE uint32_t band_word(const Node& node, int column, int first_row) {
  // column - hi <= row <= column - lo; lowering keeps both within +-2^30, so nothing overflows.
  return run_word(column - node.hi, column - node.lo + 1, first_row);
}

// ---- prefix: column < n -------------------------------------------------------------------------

ANYMASK_RULE int prefix_length(const Node& node, Place place) {
  if (node.columns.data == nullptr) return node.lo;
  const int64_t n = load_integer(node.columns, place, 0);
  return n < 0 ? 0 : n > 0x3fffffff ? 0x3fffffff : static_cast<int>(n);
}

ANYMASK_RULE TileClass prefix_class(const Node& node, Place place, const Tile& tile) {
  const int n = prefix_length(node, place);
  const bool any_visible = n > tile.column_begin;
  const bool any_hidden = n < tile.column_end;
  return class_of(any_visible, any_hidden);
}

ANYMASK_RULE uint32_t prefix_word(const Node& node, Place place, int column) {
  return column < prefix_length(node, place) ? kAllRows : 0u;
}

// ---- intervals: masked runs of rows per column --------------------------------------------------

struct MaskedRuns {
  int begin1, end1, begin2, end2;
};

ANYMASK_RULE MaskedRuns masked_runs(const Node& node, Place place, int column) {
  const int32_t* row = array_at<int32_t>(node.columns, place) + column * node.columns.row_stride;
  const int64_t step = node.columns.column_stride;
  constexpr int kEnd = 0x7fffffff;
  switch (static_cast<IntervalForm>(node.flag)) {
    case IntervalForm::kFrom:
      return {row[0], kEnd, 0, 0};
    case IntervalForm::kRun:
      return {row[0], row[step], 0, 0};
    case IntervalForm::kOutside:
      return {row[0], kEnd, 0, row[step]};
    default:
      return {row[0], row[step], row[2 * step], row[3 * step]};
  }
}

// Whether a run masks some of the rows [row_begin, row_end).
ANYMASK_RULE bool run_meets(int begin, int end, int row_begin, int row_end) {
  return begin < end && begin < row_end && end > row_begin;
}

// Whether the runs together leave one of the rows unmasked.
ANYMASK_RULE bool runs_leave_row(const MaskedRuns& runs, int row_begin, int row_end) {
  // Walk from the first row through whichever run holds it: 1, 2, 1 covers either order.
  int row = row_begin;
  if (runs.begin1 <= row) row = max_of(row, runs.end1);
  if (runs.begin2 <= row) row = max_of(row, runs.end2);
  if (runs.begin1 <= row) row = max_of(row, runs.end1);
  return row < row_end;
}

ANYMASK_RULE TileClass intervals_class(const Node& node, Place place, const Tile& tile) {
  TileClass result = 0;
  for (int column = tile.column_begin; column < tile.column_end && result != kSome; ++column) {
    const MaskedRuns runs = masked_runs(node, place, column);
    result |= class_of(runs_leave_row(runs, tile.row_begin, tile.row_end),
                       run_meets(runs.begin1, runs.end1, tile.row_begin, tile.row_end) ||
                           run_meets(runs.begin2, runs.end2, tile.row_begin, tile.row_end));
  }
  return result;
}

ANYMASK_RULE uint32_t intervals_word(const Node& node, Place place, int column, int first_row) {
  const MaskedRuns runs = masked_runs(node, place, column);
  return ~(run_word(runs.begin1, runs.end1, first_row) |
           run_word(runs.begin2, runs.end2, first_row));
}

// ---- segments: row and column between the same two of `lo` rising boundaries --------------------

struct Segment {
  int begin, end;
};

// The segment that holds `index`; what lies beyond the last boundary is a segment too.
ANYMASK_RULE Segment segment_of(const Node& node, Place place, int index) {
  int low = 0, high = node.lo;  // boundary[low] <= index < boundary[high], boundary[lo] = end
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (load_integer(node.columns, place, middle * node.columns.column_stride) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = load_integer(node.columns, place, low * node.columns.column_stride);
  const int64_t end = high < node.lo
                          ? load_integer(node.columns, place, high * node.columns.column_stride)
                          : 0x7fffffff;
  return {static_cast<int>(begin), static_cast<int>(end)};
}

ANYMASK_RULE TileClass segments_class(const Node& node, Place place, const Tile& tile) {
  const Segment first = segment_of(node, place, tile.column_begin);
  const bool one_segment = tile.column_end <= first.end;
  const Segment last = one_segment ? first : segment_of(node, place, tile.column_end - 1);
  return class_of(
      first.begin < tile.row_end && last.end > tile.row_begin,
      first.begin != last.begin || first.begin > tile.row_begin || first.end < tile.row_end);
}

ANYMASK_RULE uint32_t segments_word(const Node& node, Place place, int column, int first_row) {
  const Segment segment = segment_of(node, place, column);
  return run_word(segment.begin, segment.end, first_row);
}

// ---- ids: eq[row] == ek[column], flexible masks also eq[row] >= 0 -------------------------------

ANYMASK_RULE TileClass ids_class(const Node& node, Place place, const Tile& tile) {
  const bool open = node.flag != 0;
  int64_t least = 0, most = 0;
  bool any_equal_row = false, any_open_row = false;
  for (int row = tile.row_begin; row < tile.row_end; ++row) {
    const int64_t id = load_integer(node.rows, place, row * node.rows.row_stride);
    if (open && id >= 0) {
      any_open_row = true;
      continue;
    }
    least = any_equal_row ? (id < least ? id : least) : id;
    most = any_equal_row ? (id > most ? id : most) : id;
    any_equal_row = true;
  }
  TileClass result = any_open_row ? kVisible : 0u;
  for (int column = tile.column_begin; any_equal_row && column < tile.column_end; ++column) {
    const int64_t id = load_integer(node.columns, place, column * node.columns.row_stride);
    result |= class_of(least <= id && id <= most, least != most || least != id);
  }
  return result;
}

ANYMASK_RULE uint32_t ids_word(const Node& node, Place place, int column, int first_row,
                               int q_len) {
  const bool open = node.flag != 0;
  const int64_t wanted = load_integer(node.columns, place, column * node.columns.row_stride);
  const int count = min_of(kWordRows, q_len - first_row);
  uint32_t word = 0;
  for (int r = 0; r < count; ++r) {
    const int64_t id = load_integer(node.rows, place, (first_row + r) * node.rows.row_stride);
    word |= static_cast<uint32_t>(id == wanted || (open && id >= 0)) << r;
  }
  return word;
}

// ---- blocks: one entry per block of `lo` rows x `hi` columns ------------------------------------

ANYMASK_RULE bool block_visible(const Node& node, Place place, int row_block, int column_block) {
  return load_nonzero(
      node.columns, place,
      row_block * node.columns.row_stride + column_block * node.columns.column_stride, 0);
}

ANYMASK_RULE TileClass blocks_class(const Node& node, Place place, const Tile& tile) {
  TileClass result = 0;
  for (int row = tile.row_begin / node.lo; row <= (tile.row_end - 1) / node.lo; ++row) {
    for (int column = tile.column_begin / node.hi;
         column <= (tile.column_end - 1) / node.hi && result != kSome; ++column) {
      result |= block_visible(node, place, row, column) ? kAll : kNone;
    }
  }
  return result;
}

ANYMASK_RULE uint32_t blocks_word(const Node& node, Place place, int column, int first_row,
                                  int q_len) {
  const int last_row = min_of(first_row + kWordRows, q_len) - 1;
  uint32_t word = 0;
  for (int row = first_row / node.lo; row <= last_row / node.lo; ++row) {
    if (block_visible(node, place, row, column / node.hi)) {
      word |= run_word(row * node.lo, (row + 1) * node.lo, first_row);
    }
  }
  return word;
}

// ---- dense: one element per pair ----------------------------------------------------------------

ANYMASK_RULE bool dense_visible(const Node& node, Place place, int row, int column) {
  return load_nonzero(node.columns, place,
                      row * node.columns.row_stride + column * node.columns.column_stride,
                      node.flag);
}

ANYMASK_RULE TileClass dense_class(const Node& node, Place place, const Tile& tile) {
  TileClass result = 0;
  for (int row = tile.row_begin; row < tile.row_end; ++row) {
    for (int column = tile.column_begin; column < tile.column_end && result != kSome; ++column) {
      result |= dense_visible(node, place, row, column) ? kAll : kNone;
    }
  }
  return result;
}

ANYMASK_RULE uint32_t dense_word(const Node& node, Place place, int column, int first_row,
                                 int q_len) {
  const int count = min_of(kWordRows, q_len - first_row);
  uint32_t word = 0;
  for (int r = 0; r < count; ++r) {
    word |= static_cast<uint32_t>(dense_visible(node, place, first_row + r, column)) << r;
  }
  return word;
}

// ---- bits: packed words [row / 32][column] ------------------------------------------------------

ANYMASK_RULE uint32_t bits_word(const Node& node, Place place, int column, int first_row) {
  return array_at<uint32_t>(node.columns, place)[(first_row / kWordRows) * node.columns.row_stride +
                                                 column * node.columns.column_stride];
}

ANYMASK_RULE TileClass bits_class(const Node& node, Place place, const Tile& tile) {
  TileClass result = 0;
  for (int first = tile.row_begin / kWordRows * kWordRows; first < tile.row_end;
       first += kWordRows) {
    const uint32_t rows = run_word(tile.row_begin, tile.row_end, first);
    for (int column = tile.column_begin; column < tile.column_end && result != kSome; ++column) {
      result |= class_of_word(bits_word(node, place, column, first), rows);
    }
  }
  return result;
}

// ---- the two questions --------------------------------------------------------------------------

ANYMASK_RULE TileClass leaf_class(const Node& node, Place place, const Tile& tile) {
  switch (node.op) {
    case Op::kConstant:
      return node.flag != 0 ? kAll : kNone;
    case Op::kBand:
      return band_class(node, tile);
    case Op::kPrefix:
      return prefix_class(node, place, tile);
    case Op::kIntervals:
      return intervals_class(node, place, tile);
    case Op::kSegments:
      return segments_class(node, place, tile);
    case Op::kIds:
      return ids_class(node, place, tile);
    case Op::kBlocks:
      return blocks_class(node, place, tile);
    case Op::kDense:
      return dense_class(node, place, tile);
    case Op::kBits:
      return bits_class(node, place, tile);
    default:
      return kSome;
  }
}

// The word of rows [first_row, first_row + 32) for `column`; first_row is a multiple of 32 below
// q_len. Bits of rows from q_len on are arbitrary.
ANYMASK_RULE uint32_t leaf_word(const Node& node, Place place, int column, int first_row,
                                int q_len) {
  switch (node.op) {
    case Op::kConstant:
      return node.flag != 0 ? kAllRows : 0u;
    case Op::kBand:
      return band_word(node, column, first_row);
    case Op::kPrefix:
      return prefix_word(node, place, column);
    case Op::kIntervals:
      return intervals_word(node, place, column, first_row);
    case Op::kSegments:
      return segments_word(node, place, column, first_row);
    case Op::kIds:
      return ids_word(node, place, column, first_row, q_len);
    case Op::kBlocks:
      return blocks_word(node, place, column, first_row, q_len);
    case Op::kDense:
      return dense_word(node, place, column, first_row, q_len);
    case Op::kBits:
      return bits_word(node, place, column, first_row);
    default:
      return 0u;
  }
}

}  // namespace anymask::rules
