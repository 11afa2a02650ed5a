// What is known of a set of pairs from a few looks: what it may hold, and what it surely holds.
// Where the two agree the class is exact; only where they differ have pairs to be looked at.
#pragma once

#include "rules/evaluate.h"

namespace anymask::rules {

// Bits 0 and 1: a TileClass, what the set may hold. Bits 2 and 3: the same, what it surely holds.
using Known = uint32_t;
inline constexpr Known kSurely = 4;
inline constexpr Known kVisibleBits = kVisible * (1 + kSurely);

ANYMASK_RULE constexpr Known known_of(TileClass may, TileClass surely) {
  return may | surely * kSurely;
}
ANYMASK_RULE constexpr Known surely(TileClass value) { return known_of(value, value); }
ANYMASK_RULE constexpr TileClass may_hold(Known known) { return known & kSome; }
ANYMASK_RULE constexpr TileClass surely_holds(Known known) { return known / kSurely; }

struct JoinKnown {
  using Value = Known;
  ANYMASK_RULE static Value complement(Value a) {
    return (a & kVisibleBits) << 1 | (a >> 1 & kVisibleBits);
  }
  // Where all of one side is visible, what the other side surely shows is there.
  ANYMASK_RULE static Value both(Value a, Value b) {
    const Known shown_by_a = (b & kHidden) != 0 ? 0 : a;
    const Known shown_by_b = (a & kHidden) != 0 ? 0 : b;
    const Known surely_visible = (shown_by_a | shown_by_b) & (kVisible * kSurely);
    const Known surely_hidden = (a | b) & (kHidden * kSurely);
    return class_and(may_hold(a), may_hold(b)) | surely_visible | surely_hidden;
  }
  ANYMASK_RULE static Value either(Value a, Value b) {
    return complement(both(complement(a), complement(b)));
  }
};

// ---- ids: rows of which only the range is known -------------------------------------------------

struct IdRange {
  int64_t least, most;  // of the rows that match by value
  bool any_closed;      // there are such rows
  bool any_open;        // there are rows that see every column

  ANYMASK_RULE void add(const IdRange& other) {
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
    any_closed |= other.any_closed;
    any_open |= other.any_open;
  }
};
inline constexpr int64_t kLargestId = 0x7fffffffffffffff;
inline constexpr IdRange kNoIds = {kLargestId, -kLargestId - 1, false, false};

ANYMASK_RULE IdRange id_of_row(const Node& node, Place place, int row) {
  const int64_t id = load_integer(node.rows, place, row * node.rows.row_stride);
  const bool open = node.flag != 0 && id >= 0;
  return open ? IdRange{kNoIds.least, kNoIds.most, false, true} : IdRange{id, id, true, false};
}

// Rows against columns whose ids lie in [least, most]. Both ends of a range are somebody's id; with
// two different ids on one side, some pair differs.
ANYMASK_RULE Known ids_known(const IdRange& rows, int64_t least, int64_t most) {
  Known known = rows.any_open ? surely(kVisible) : 0;
  if (!rows.any_closed) return known;
  if (rows.least <= most && least <= rows.most) known |= kVisible;
  if (rows.least == least || rows.least == most || rows.most == least || rows.most == most) {
    known |= surely(kVisible);
  }
  if (rows.least != least || rows.most != least || least != most) known |= surely(kHidden);
  return known;
}

// ---- intervals: columns of which only the bounds of their runs are known ------------------------

// `widest` begin first and end last among the columns' runs, `narrowest` begin last and end first:
// a row outside of `widest` is masked in no column, a row inside of `narrowest` in every column.
struct RunBounds {
  MaskedRuns widest, narrowest;

  ANYMASK_RULE void add(const RunBounds& other) {
    widest = {min_of(widest.begin1, other.widest.begin1), max_of(widest.end1, other.widest.end1),
              min_of(widest.begin2, other.widest.begin2), max_of(widest.end2, other.widest.end2)};
    narrowest = {max_of(narrowest.begin1, other.narrowest.begin1),
                 min_of(narrowest.end1, other.narrowest.end1),
                 max_of(narrowest.begin2, other.narrowest.begin2),
                 min_of(narrowest.end2, other.narrowest.end2)};
  }
};
inline constexpr int kLastRow = 0x7fffffff;
inline constexpr MaskedRuns kEmptyRuns = {kLastRow, -kLastRow, kLastRow, -kLastRow};
inline constexpr RunBounds kNoRuns = {kEmptyRuns, {-kLastRow, kLastRow, -kLastRow, kLastRow}};

ANYMASK_RULE RunBounds runs_of_column(const Node& node, Place place, int column) {
  // An empty run may be given by any two rows; made the emptiest, it widens nothing.
  MaskedRuns runs = masked_runs(node, place, column);
  if (runs.begin1 >= runs.end1) runs.begin1 = kLastRow, runs.end1 = -kLastRow;
  if (runs.begin2 >= runs.end2) runs.begin2 = kLastRow, runs.end2 = -kLastRow;
  return {runs, runs};
}

// Every bound is some column's: the column whose run begins first masks [first begin, first end),
// the one whose run ends last masks [last begin, last end), where these are not empty; and a column
// shows the first row of the tile if its run begins later, the last one if its run ends before it.
ANYMASK_RULE Known runs_known(const RunBounds& bounds, int row_begin, int row_end) {
  const MaskedRuns &widest = bounds.widest, &narrowest = bounds.narrowest;
  const auto meets = [&](int begin, int end) { return run_meets(begin, end, row_begin, row_end); };
  const auto some_differs = [&](int last_begin, int first_end) {
    return last_begin > row_begin || first_end < row_end;
  };
  const bool may_mask1 = meets(widest.begin1, widest.end1);
  const bool may_mask2 = meets(widest.begin2, widest.end2);
  const bool surely_hidden =
      meets(widest.begin1, narrowest.end1) || meets(narrowest.begin1, widest.end1) ||
      meets(widest.begin2, narrowest.end2) || meets(narrowest.begin2, widest.end2);
  const bool surely_visible = runs_leave_row(widest, row_begin, row_end) ||
                              (!may_mask2 && some_differs(narrowest.begin1, narrowest.end1)) ||
                              (!may_mask1 && some_differs(narrowest.begin2, narrowest.end2));
  return known_of(class_of(runs_leave_row(narrowest, row_begin, row_end), may_mask1 || may_mask2),
                  class_of(surely_visible, surely_hidden));
}

}  // namespace anymask::rules
