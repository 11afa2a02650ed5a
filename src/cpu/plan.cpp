#include "cpu/plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/key_order.h"
#include "cpu/threads.h"
#include "cpu/tile_classes.h"
#include "rules/evaluate.h"

namespace anymask::cpu {
namespace {

using plan::TileMap;
using rules::Place;
using rules::Program;
using rules::Tile;
using rules::TileClass;

Place place_of(const Program& program, int64_t index) {
  return {static_cast<int>(index / program.heads), static_cast<int>(index % program.heads)};
}

// ---- dense leaves to words ----------------------------------------------------------------------

template <typename Element>
void pack_rows(const Element* first, int64_t row_stride, int64_t column_stride, int rows,
               int64_t columns, bool is_float, uint32_t* words) {
  const int sign_bits = is_float ? 1 : 0;
  std::fill_n(words, columns, 0u);
  for (int r = 0; r < rows; ++r) {
    const Element* row = first + r * row_stride;
    for (int64_t c = 0; c < columns; ++c) {
      const auto shifted = static_cast<Element>(row[c * column_stride] << sign_bits);
      words[c] |= static_cast<uint32_t>(shifted != 0) << r;
    }
  }
}

void pack_word_row(const rules::Node& dense, const char* first, int rows, int64_t columns,
                   uint32_t* words) {
  const rules::Array& array = dense.columns;
  const auto pack = [&](auto element) {
    pack_rows(reinterpret_cast<const decltype(element)*>(first), array.row_stride,
              array.column_stride, rows, columns, dense.flag != 0, words);
  };
  switch (array.bytes) {
    case 1:
      return pack(uint8_t{});
    case 2:
      return pack(uint16_t{});
    case 4:
      return pack(uint32_t{});
    default:
      return pack(uint64_t{});
  }
}

void pack_dense(const Program& program, const rules::Node& dense, const rules::Node& bits) {
  const plan::PackedShape shape = plan::packed_shape(program, dense);
  const rules::Array& from = dense.columns;
  auto* words = const_cast<uint32_t*>(static_cast<const uint32_t*>(bits.columns.data));
  parallel_for(shape.batches * shape.heads * shape.row_words, [&](int64_t task, int) {
    const int64_t word_row = task % shape.row_words;
    const int64_t head = task / shape.row_words % shape.heads;
    const int64_t batch = task / shape.row_words / shape.heads;
    const int64_t first_row = word_row * rules::kWordRows;
    const bool one_row = from.row_stride == 0;
    const int rows =
        one_row ? 1
                : static_cast<int>(std::min<int64_t>(rules::kWordRows, program.q_len - first_row));
    const int64_t offset =
        batch * from.batch_stride + head * from.head_stride + first_row * from.row_stride;
    uint32_t* target = words + task * shape.columns;
    pack_word_row(dense, static_cast<const char*>(from.data) + offset * from.bytes, rows,
                  shape.columns, target);
    if (one_row) {
      for (int64_t c = 0; c < shape.columns; ++c) target[c] = 0u - target[c];
    }
  });
}

// ---- tile maps ----------------------------------------------------------------------------------

// Tiles of a task: some 0.5 ms for most masks. On a busy machine a second thread may be 4 ms late.
constexpr int kTaskTiles = 65536;

// Fills the row map of one place.
class MapBuilder {
 public:
  MapBuilder(const Program& program, const TileClasses& classes, const TileMap& map,
             int64_t place_index)
      : program_(program),
        classes_(classes),
        map_(map),
        place_(place_of(program, place_index)),
        first_row_tile_(place_index * map.outer_tiles) {}

  // Halves a rectangle of tiles until it is of one class: a large uniform area costs one look.
  // Rectangles of different row tiles touch different words, so they may run in parallel.
  void fill(Span rows, Span keys) const {
    if (rows.index >= classes_.rows().count(rows.level) ||
        keys.index >= classes_.keys().count(keys.level)) {
      return;
    }
    const rules::Known known = classes_.known(place_, rows, keys);
    if (rules::may_hold(known) != rules::kSome) return set(rows, keys, rules::may_hold(known));
    if (rows.level == 0 && keys.level == 0) {
      const bool sure = rules::surely_holds(known) == rules::kSome;
      return set(rows, keys,
                 sure ? rules::kSome : exact_class(program_, place_, classes_.tile(rows, keys)));
    }
    const bool split_rows = rows.level >= keys.level;
    Span& split = split_rows ? rows : keys;
    split = {split.level - 1, 2 * split.index};
    fill(rows, keys);
    ++split.index;
    fill(rows, keys);
  }

 private:
  void set(Span rows, Span keys, TileClass found) const {
    if (found == rules::kNone) return;
    const int row_end = std::min((rows.index + 1) << rows.level, map_.outer_tiles);
    const int column_end = std::min((keys.index + 1) << keys.level, map_.inner_tiles);
    for (int row = rows.index << rows.level; row < row_end; ++row) {
      const int64_t first_word = (first_row_tile_ + row) * map_.words;
      for (int column = keys.index << keys.level; column < column_end; ++column) {
        const uint32_t bit = 1u << (column % 32);
        const bool beyond_keys = (column + 1) * map_.shape.columns > program_.kv_len;
        map_.visible[first_word + column / 32] |= bit;
        if (found == rules::kSome || beyond_keys) map_.hidden[first_word + column / 32] |= bit;
      }
    }
  }

  const Program& program_;
  const TileClasses& classes_;
  const TileMap& map_;
  const Place place_;
  const int64_t first_row_tile_;
};

void build_row_map(const Program& program, const TileMap& map) {
  const int64_t all = plan::places(program) * map.outer_tiles;
  std::fill_n(map.visible, all * map.words, 0u);
  std::fill_n(map.hidden, all * map.words, 0u);
  if (all == 0 || map.inner_tiles == 0) return;
  const TileClasses classes(program, map.shape);
  // Strips of row tiles, as large as a task may be: large rectangles settle early.
  int level = 0;
  while (level + 1 < classes.rows().levels() && map.inner_tiles << level < kTaskTiles) ++level;
  const int strips = classes.rows().count(level);
  const int64_t group = std::max(1, kTaskTiles / (map.inner_tiles << level));
  parallel_in_groups(plan::places(program) * strips, group, [&](int64_t index) {
    const MapBuilder builder(program, classes, map, index / strips);
    builder.fill({level, static_cast<int>(index % strips)}, {classes.keys().levels() - 1, 0});
  });
}

// The column map of the same tile shape: the row map with its two indices swapped.
void transpose_map(const Program& program, const TileMap& rows, const TileMap& columns) {
  const int64_t all = plan::places(program) * columns.outer_tiles;
  std::fill_n(columns.visible, all * columns.words, 0u);
  std::fill_n(columns.hidden, all * columns.words, 0u);
  if (all == 0 || rows.outer_tiles == 0) return;
  // By words of the row map: the 32 key tiles of a word are its own.
  const int64_t group = std::max(1, kTaskTiles / rows.outer_tiles);
  parallel_in_groups(plan::places(program) * rows.words, group, [&](int64_t index) {
    const int64_t place = index / rows.words;
    const int64_t word = index % rows.words;
    for (int row = 0; row < rows.outer_tiles; ++row) {
      const int64_t from = (place * rows.outer_tiles + row) * rows.words + word;
      const uint32_t bit = 1u << (row % 32);
      for (uint32_t rest = rows.visible[from]; rest != 0; rest &= rest - 1) {
        const int column = std::countr_zero(rest);
        const int64_t to =
            (place * columns.outer_tiles + word * 32 + column) * columns.words + row / 32;
        columns.visible[to] |= bit;
        if ((rows.hidden[from] >> column & 1u) != 0) columns.hidden[to] |= bit;
      }
    }
  });
}

void count_and_order(const Program& program, const TileMap& map) {
  if (map.total != nullptr) *map.total = 0;
  for (int64_t place = 0; place < plan::places(program); ++place) {
    int32_t* count = map.count + place * map.outer_tiles;
    int32_t* order = map.order + place * map.outer_tiles;
    const uint32_t* words = map.visible + place * map.outer_tiles * map.words;
    for (int32_t outer = 0; outer < map.outer_tiles; ++outer) {
      const uint32_t* row = words + int64_t{outer} * map.words;
      count[outer] = std::accumulate(row, row + map.words, 0, [](int sum, uint32_t word) {
        return sum + std::popcount(word);
      });
      if (map.total != nullptr) *map.total += count[outer];
    }
    std::iota(order, order + map.outer_tiles, 0);
    std::stable_sort(order, order + map.outer_tiles,
                     [&](int32_t a, int32_t b) { return count[a] > count[b]; });
  }
}

}  // namespace

TileClass exact_class(const Program& program, Place place, const Tile& tile) {
  TileClass found = tile_class(program, place, tile);
  if (found != rules::kSome) return found;
  found = 0;
  for (int first = tile.row_begin / rules::kWordRows * rules::kWordRows; first < tile.row_end;
       first += rules::kWordRows) {
    const uint32_t rows = rules::run_word(tile.row_begin, tile.row_end, first);
    for (int column = tile.column_begin; column < tile.column_end; ++column) {
      found |= rules::class_of_word(column_word(program, place, column, first), rows);
      if (found == rules::kSome) return found;
    }
  }
  return found;
}

void build_plan(const Program& lowered, const plan::Plan& plan) {
  for (int32_t i = 0; i < lowered.count; ++i) {
    if (lowered.nodes[i].op == rules::Op::kDense) {
      pack_dense(lowered, lowered.nodes[i], plan.program.nodes[i]);
    }
  }
  if (plan.program.key_order != nullptr) {
    Program unordered = plan.program;
    unordered.key_order = nullptr;
    order_keys(unordered, plan.forward_rows.shape.columns,
               const_cast<int32_t*>(plan.program.key_order), plan.seen_keys);
  }
  build_row_map(plan.program, plan.forward_rows);
  count_and_order(plan.program, plan.forward_rows);
  if (plan.backward_columns.visible == nullptr) return;
  const bool shared = plan.backward_rows.visible == plan.forward_rows.visible;
  if (!shared) {
    build_row_map(plan.program, plan.backward_rows);
    count_and_order(plan.program, plan.backward_rows);
  }
  transpose_map(plan.program, plan.backward_rows, plan.backward_columns);
  count_and_order(plan.program, plan.backward_columns);
}

}  // namespace anymask::cpu
