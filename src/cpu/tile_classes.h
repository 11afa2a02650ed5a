// What is known of rectangles of tiles, each in a few steps: arrays are read once and summarized
// for single tiles, pairs of tiles, and so on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/layout.h"
#include "rules/known.h"

namespace anymask::cpu {

// 2^level tiles from tile index x 2^level on; the last of a level may reach beyond the end.
struct Span {
  int level, index;
};

// All spans of a number of tiles, as positions in an array: single tiles first, the whole last.
class Spans {
 public:
  explicit Spans(int tiles) : begin_{0} {
    for (int count = tiles; count > 0; count = count > 1 ? (count + 1) / 2 : 0) {
      begin_.push_back(begin_.back() + count);
    }
  }
  int size() const { return begin_.back(); }
  int levels() const { return static_cast<int>(begin_.size()) - 1; }
  int count(int level) const {
    const auto at = static_cast<std::size_t>(level);
    return begin_[at + 1] - begin_[at];
  }
  int position(Span span) const {
    return begin_[static_cast<std::size_t>(span.level)] + span.index;
  }

 private:
  std::vector<int> begin_;
};

class TileClasses {
 public:
  // Reads all arrays of `program` but those with an element per pair.
  TileClasses(const rules::Program& program, plan::TileShape shape);

  const Spans& rows() const { return row_spans_; }
  const Spans& keys() const { return key_spans_; }
  // The rows and positions of two spans, and what is known of their pairs.
  rules::Tile tile(Span rows, Span keys) const;
  rules::Known known(rules::Place place, Span rows, Span keys) const;

 private:
  // Ids of several rows or keys. Equal ids have equal marks, and few others have the same.
  struct Ids {
    rules::IdRange range = rules::kNoIds;
    uint64_t marks = 0;
    void add(const Ids& other) {
      range.add(other.range);
      marks |= other.marks;
    }
  };
  // The first and last key at several positions, where keys are reordered.
  struct KeyRange {
    int least = 0x7fffffff, most = -1;
    void add(const KeyRange& other) {
      least = rules::min_of(least, other.least);
      most = rules::max_of(most, other.most);
    }
  };
  // What a leaf that reads an array per key says of several keys.
  struct LeafKeys {
    rules::RunBounds runs = rules::kNoRuns;  // kIntervals
    Ids ids;                                 // kIds
    void add(const LeafKeys& other) {
      runs.add(other.runs);
      ids.add(other.ids);
    }
  };

  Ids ids_of_tile(const rules::Node& node, rules::Place place, int row_tile) const;
  LeafKeys keys_of_tile(const rules::Node& node, rules::Place place, int key_tile) const;
  KeyRange range_of_tile(rules::Place place, int key_tile) const;

  const rules::Program& program_;
  const plan::TileShape shape_;
  const Spans row_spans_, key_spans_;
  // [place][leaf with arrays per row or key][span]
  std::vector<const rules::Node*> leaves_;
  std::vector<Ids> row_ids_;
  std::vector<LeafKeys> leaf_keys_;
  std::vector<KeyRange> key_ranges_;  // [place][span]
};

}  // namespace anymask::cpu
