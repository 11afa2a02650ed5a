#include "cpu/tile_classes.h"

#include "cpu/threads.h"

namespace anymask::cpu {
namespace {

using rules::Known;
using rules::Node;
using rules::Op;
using rules::Place;
using rules::Program;
using rules::Tile;
using rules::TileClass;

int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

// One of 64 bits, of neighbouring ids different ones.
uint64_t mark_of(int64_t id) { return uint64_t{1} << (id & 63); }

// Fills [rows][spans]: single tiles by of(row, tile), wider spans from their halves.
template <class Summary, class Of>
void summarize(const Spans& spans, int64_t rows, std::vector<Summary>& all, const Of& of) {
  if (rows == 0 || spans.size() == 0) return;
  all.resize(static_cast<size_t>(rows * spans.size()));
  const auto at = [&](int64_t row, Span span) -> Summary& {
    return all[static_cast<size_t>(row * spans.size() + spans.position(span))];
  };
  constexpr int64_t kTiles = 256;  // a task
  parallel_in_groups(rows * spans.count(0), kTiles, [&](int64_t index) {
    const int64_t row = index / spans.count(0);
    const int tile = static_cast<int>(index % spans.count(0));
    at(row, {0, tile}) = of(row, tile);
  });
  for (int64_t row = 0; row < rows; ++row) {
    for (int level = 1; level < spans.levels(); ++level) {
      for (int i = 0; i < spans.count(level); ++i) {
        Summary& whole = at(row, {level, i}) = at(row, {level - 1, 2 * i});
        if (2 * i + 1 < spans.count(level - 1)) whole.add(at(row, {level - 1, 2 * i + 1}));
      }
    }
  }
}

// Keys [least, most] of which only the two are surely there.
Known scattered_known(const Node& node, Place place, const Tile& tile, int least, int most) {
  const auto class_of_keys = [&](int begin, int end) {
    return leaf_class(node, place, {tile.row_begin, tile.row_end, begin, end});
  };
  const bool per_pair = node.op == Op::kBlocks || node.op == Op::kBits || node.op == Op::kDense;
  return rules::known_of(per_pair ? rules::kSome : class_of_keys(least, most + 1),
                         class_of_keys(least, least + 1) | class_of_keys(most, most + 1));
}

}  // namespace

TileClasses::TileClasses(const Program& program, plan::TileShape shape)
    : program_(program),
      shape_(shape),
      row_spans_(tiles_of(program.q_len, shape.rows)),
      key_spans_(tiles_of(program.kv_len, shape.columns)) {
  for (int i = 0; i < program.count; ++i) {
    const Op op = program.nodes[i].op;
    if (op == Op::kIntervals || op == Op::kIds) leaves_.push_back(&program.nodes[i]);
  }
  const auto leaves = static_cast<int64_t>(leaves_.size());
  const int64_t places = int64_t{program.batches} * program.heads;
  const auto place_at = [&](int64_t index) -> Place {
    return {static_cast<int>(index / program.heads), static_cast<int>(index % program.heads)};
  };
  const auto leaf_at = [&](int64_t row) -> const Node& {
    return *leaves_[static_cast<size_t>(row % leaves)];
  };
  summarize(row_spans_, places * leaves, row_ids_, [&](int64_t row, int tile) {
    return ids_of_tile(leaf_at(row), place_at(row / leaves), tile);
  });
  summarize(key_spans_, places * leaves, leaf_keys_, [&](int64_t row, int tile) {
    return keys_of_tile(leaf_at(row), place_at(row / leaves), tile);
  });
  summarize(key_spans_, program.key_order == nullptr ? 0 : places, key_ranges_,
            [&](int64_t row, int tile) { return range_of_tile(place_at(row), tile); });
}

TileClasses::Ids TileClasses::ids_of_tile(const Node& node, Place place, int row_tile) const {
  Ids ids;
  if (node.op != Op::kIds) return ids;
  const Tile rows = tile({0, row_tile}, {0, 0});
  for (int row = rows.row_begin; row < rows.row_end; ++row) {
    const rules::IdRange one = rules::id_of_row(node, place, row);
    ids.add({one, one.any_closed ? mark_of(one.least) : 0});
  }
  return ids;
}

TileClasses::LeafKeys TileClasses::keys_of_tile(const Node& node, Place place, int key_tile) const {
  LeafKeys keys;
  const Tile columns = tile({0, 0}, {0, key_tile});
  for (int position = columns.column_begin; position < columns.column_end; ++position) {
    const int key = rules::key_at(program_, place, position);
    if (node.op == Op::kIntervals) {
      keys.runs.add(rules::runs_of_column(node, place, key));
    } else {
      const int64_t id = rules::load_integer(node.columns, place, key * node.columns.row_stride);
      keys.ids.add({{id, id, true, false}, mark_of(id)});
    }
  }
  return keys;
}

TileClasses::KeyRange TileClasses::range_of_tile(Place place, int key_tile) const {
  KeyRange range;
  const Tile columns = tile({0, 0}, {0, key_tile});
  for (int position = columns.column_begin; position < columns.column_end; ++position) {
    const int key = rules::key_at(program_, place, position);
    range.add({key, key});
  }
  return range;
}

Tile TileClasses::tile(Span rows, Span keys) const {
  const int64_t row = int64_t{rows.index} << rows.level, key = int64_t{keys.index} << keys.level;
  const auto upto = [](int64_t tiles, int size, int length) {
    return static_cast<int>(tiles * size < length ? tiles * size : length);
  };
  return {static_cast<int>(row * shape_.rows),
          upto(row + (int64_t{1} << rows.level), shape_.rows, program_.q_len),
          static_cast<int>(key * shape_.columns),
          upto(key + (int64_t{1} << keys.level), shape_.columns, program_.kv_len)};
}

Known TileClasses::known(Place place, Span rows, Span keys) const {
  const Tile pairs = tile(rows, keys);
  const int row_at = row_spans_.position(rows), key_at = key_spans_.position(keys);
  const int64_t index = int64_t{place.batch} * program_.heads + place.head;
  auto leaf = index * static_cast<int64_t>(leaves_.size());
  return rules::evaluate<rules::JoinKnown>(program_, [&](const Node& node) -> Known {
    if (node.op == Op::kIntervals) {
      const LeafKeys& of = leaf_keys_[static_cast<size_t>(leaf++ * key_spans_.size() + key_at)];
      return rules::runs_known(of.runs, pairs.row_begin, pairs.row_end);
    }
    if (node.op == Op::kIds) {
      const Ids& mine = row_ids_[static_cast<size_t>(leaf * row_spans_.size() + row_at)];
      const Ids& of = leaf_keys_[static_cast<size_t>(leaf++ * key_spans_.size() + key_at)].ids;
      const Known known = rules::ids_known(mine.range, of.range.least, of.range.most);
      const bool may_meet = mine.range.any_open || (mine.marks & of.marks) != 0;
      return may_meet ? known : known & ~rules::kVisible;
    }
    if (program_.key_order == nullptr) return rules::surely(leaf_class(node, place, pairs));
    const KeyRange& range = key_ranges_[static_cast<size_t>(index * key_spans_.size() + key_at)];
    return scattered_known(node, place, pairs, range.least, range.most);
  });
}

}  // namespace anymask::cpu
