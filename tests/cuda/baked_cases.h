// Baked bits of plans against the rules, pair by pair: what the attention kernels will find for
// each row and position of each partial tile.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "cuda/plan_cases.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// What a build left of a plan, read as the plan is laid out.
class BakedPlan {
 public:
  BakedPlan(const Program& host, const BuiltPlan& built) : built_(built), host_(host) {
    if (host.reorder_keys != 0) host_.key_order = at(built.plan.program.key_order);
  }

  // Every partial tile of both maps. Bits of rows that do not exist may be anything, positions that
  // do not exist are hidden.
  void check(bool forward_only = false) const {
    ASSERT_NE(rows().baked, nullptr);
    ASSERT_EQ(columns().baked == nullptr, forward_only);
    for (int b = 0; b < host_.batches; ++b) {
      for (int h = 0; h < host_.heads; ++h) {
        const std::vector<uint32_t> words = words_of({b, h});
        const int64_t place = int64_t{b} * host_.heads + h;
        each_partial_tile(rows(), place, [&](int outer, int inner, int64_t tile) {
          check_row_tile(words, outer, inner, tile);
        });
        each_partial_tile(columns(), place, [&](int outer, int inner, int64_t tile) {
          check_column_tile(words, inner, outer, tile);
        });
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }

 private:
  template <typename T>
  const T* at(const T* section) const {
    const auto offset =
        reinterpret_cast<const char*>(section) - static_cast<const char*>(built_.base);
    return reinterpret_cast<const T*>(built_.content.data() + offset);
  }
  const plan::TileMap& rows() const { return built_.plan.forward_rows; }
  const plan::TileMap& columns() const { return built_.plan.backward_columns; }

  // [row / 32][position], by the rules and from the elements of dense leaves.
  std::vector<uint32_t> words_of(rules::Place place) const {
    std::vector<uint32_t> words;
    for (int row = 0; row < host_.q_len; row += 32) {
      for (int position = 0; position < host_.kv_len; ++position) {
        words.push_back(rules::column_word(host_, place, position, row));
      }
    }
    return words;
  }
  bool visible(const std::vector<uint32_t>& words, int row, int position) const {
    if (position >= host_.kv_len) return false;
    const size_t index = static_cast<size_t>(row / 32) * static_cast<size_t>(host_.kv_len);
    return (words[index + static_cast<size_t>(position)] >> (row % 32) & 1u) != 0;
  }

  template <typename Check>
  void each_partial_tile(const plan::TileMap& map, int64_t place, const Check& check_tile) const {
    for (int outer = 0; outer < map.outer_tiles; ++outer) {
      for (int inner = 0; inner < map.inner_tiles; ++inner) {
        const int64_t row = place * map.outer_tiles + outer;
        const int64_t word = row * map.words + inner / 32;
        if ((at(map.visible)[word] & at(map.hidden)[word]) >> (inner % 32) & 1u) {
          check_tile(outer, inner, row * map.inner_tiles + inner);
        }
      }
    }
  }

  void check_row_tile(const std::vector<uint32_t>& words, int row_tile, int key_tile,
                      int64_t tile) const {
    const plan::TileShape shape = rows().shape;
    const int groups = (shape.columns + 127) / 128, blocks = shape.rows / 64 * groups;
    const uint32_t* baked = at(rows().baked) + tile * plan::row_tile_words(shape);
    std::vector<uint32_t> classes(static_cast<size_t>(blocks), 0);
    for (int r = 0; r < shape.rows; ++r) {
      const int row = row_tile * shape.rows + r;
      for (int c = 0; c < shape.columns; ++c) {
        const int block = r / 64 * groups + c / 128;
        const int lane = c % 8 / 2, bit = c % 128 / 8 * 2 + c % 2;
        const int half = c % 128 / 64;
        if (row >= host_.q_len) continue;
        const bool seen = visible(words, row, key_tile * shape.columns + c);
        classes[static_cast<size_t>(block)] |= (seen ? 1u : 4u) << half;
        const uint32_t word = baked[(block * 64 + r % 64) * 4 + lane];
        ASSERT_EQ(word >> bit & 1u, seen ? 1u : 0u)
            << "row " << row << ", position " << key_tile * shape.columns + c;
      }
    }
    for (int block = 0; block < blocks; ++block) {
      const uint32_t found = baked[blocks * 256 + block];
      const int row_end = row_tile * shape.rows + (block / groups + 1) * 64;
      const uint32_t known = row_end <= host_.q_len ? ~0u : classes[static_cast<size_t>(block)];
      ASSERT_EQ(found & known, classes[static_cast<size_t>(block)])
          << "class of strip and group " << block << " of tile " << row_tile << ", " << key_tile;
    }
  }

  void check_column_tile(const std::vector<uint32_t>& words, int row_tile, int key_tile,
                         int64_t tile) const {
    const plan::TileShape shape = columns().shape;
    const uint32_t* baked = at(columns().baked) + tile * shape.columns * (shape.rows / 32);
    for (int c = 0; c < shape.columns; ++c) {
      for (int r = 0; r < shape.rows && row_tile * shape.rows + r < host_.q_len; ++r) {
        const int row = row_tile * shape.rows + r, position = key_tile * shape.columns + c;
        ASSERT_EQ(baked[c * (shape.rows / 32) + r / 32] >> (r % 32) & 1u,
                  visible(words, row, position) ? 1u : 0u)
            << "row " << row << ", position " << position;
      }
    }
  }

  const BuiltPlan& built_;
  Program host_;
};

// Rows x columns of the tiles that the kernels for some head dimensions have.
inline const plan::TileShapes kBakedShapes[] = {
    {{192, 128}, {64, 128}, 1}, {{192, 192}, {64, 128}, 1}, {{192, 96}, {64, 128}, 1},
    {{128, 128}, {64, 128}, 1}, {{128, 96}, {64, 64}, 1},   {{128, 80}, {64, 64}, 1},
};

inline const Case kBakedCases[] = {
    {"scattered", [](Masks& m) { m.dense<uint8_t>('r', false, 1); }},
    {"runs", [](Masks& m) { m.dense<uint8_t>('r', false, 900); }},
    {"causal",
     [](Masks& m) {
       m.dense<uint16_t>('p', true, 3);
       m.band(1 << 30, 0);
       m.join(Op::kAnd);
     }},
    {"or_not",
     [](Masks& m) {
       m.dense<uint8_t>('r', false, 700);
       m.join(Op::kNot);
       m.dense<uint32_t>('c', true, 200);
       m.join(Op::kAnd);
       m.intervals(IntervalForm::kTwoRuns, false);
       m.join(Op::kOr);
     }},
    {"one_row_and_ids",
     [](Masks& m) {
       m.dense<uint8_t>('-', false, 30);
       m.dense<uint8_t>('r', false, 5);
       m.join(Op::kOr);
       m.ids<int64_t>(true, true);
       m.join(Op::kAnd);
     }},
    {"reordered",
     [](Masks& m) {
       m.dense<uint8_t>('r', false, 7);
       m.intervals(IntervalForm::kFrom, true);
       m.join(Op::kAnd);
       m.program.reorder_keys = 1;
       m.program.order_divisor = m.program.heads;
     }},
};

// Each mask with each shape, in turns of sizes; `build(masks, shapes)` returns a BuiltPlan.
template <typename Build>
void check_baked_plans(Build build) {
  const int sizes[][4] = {{2, 2, 333, 301}, {3, 1, 65, 881}, {1, 4, 700, 79}, {1, 1, 129, 129}};
  unsigned seed = 0;
  for (const plan::TileShapes& shapes : kBakedShapes) {
    for (const Case& mask : kBakedCases) {
      const auto& [batches, heads, q_len, kv_len] = sizes[seed++ % std::size(sizes)];
      SCOPED_TRACE(std::string(mask.name) + ", q_len " + std::to_string(q_len) + ", kv_len " +
                   std::to_string(kv_len) + ", tiles of " + std::to_string(shapes.forward.rows) +
                   " x " + std::to_string(shapes.forward.columns));
      Masks masks(seed, batches, heads, q_len, kv_len);
      mask.fill(masks);
      const BuiltPlan built = build(masks, shapes);
      expect_same_plan(masks.program, shapes, built);
      BakedPlan(masks.program, built).check();
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

}  // namespace anymask::cuda
