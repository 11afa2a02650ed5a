// Plans: every tile of the maps against the pairs, dense leaves packed, order and counts.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>
#include <vector>

#include "anymask/anymask.hpp"
#include "cpu/plan.h"
#include "mask/lower.h"
#include "plan/view.h"
#include "problem.h"
#include "rules/evaluate.h"
#include "rules/key_rows.h"

namespace anymask {
namespace {

constexpr plan::TileShapes kShapes{.forward = {32, 48}, .backward = {64, 32}};

struct Built {
  rules::Program lowered;
  std::vector<char> memory;
  plan::Plan plan;

  Built(const Mask& mask, const Problem& p, plan::TileShapes shapes) : lowered(lower(mask, p)) {
    memory.assign(static_cast<size_t>(plan::bytes_needed(lowered, shapes)) + 256, 0x5a);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    plan = plan::view(lowered, shapes, reinterpret_cast<void*>((address + 255) / 256 * 256));
    cpu::build_plan(lowered, plan);
  }
};

uint32_t bit(const uint32_t* words, int64_t index, int32_t width, int32_t i) {
  return words[index * width + i / 32] >> (i % 32) & 1u;
}

void expect_map(const Built& built, const plan::TileMap& map, bool by_rows) {
  rules::Program program = built.lowered;
  program.key_order = built.plan.program.key_order;
  int64_t total = 0;
  for (int b = 0; b < program.batches; ++b) {
    for (int h = 0; h < program.heads; ++h) {
      const int64_t base = int64_t{b * program.heads + h} * map.outer_tiles;
      for (int outer = 0; outer < map.outer_tiles; ++outer) {
        int count = 0;
        for (int inner = 0; inner < map.words * 32; ++inner) {
          const uint32_t visible = bit(map.visible, base + outer, map.words, inner);
          const uint32_t hidden = bit(map.hidden, base + outer, map.words, inner);
          uint32_t truth = 0;
          const int row_tile = by_rows ? outer : inner, column_tile = by_rows ? inner : outer;
          const int r0 = row_tile * map.shape.rows, c0 = column_tile * map.shape.columns;
          for (int i = r0; i < std::min(r0 + map.shape.rows, program.q_len); ++i) {
            for (int j = c0; j < std::min(c0 + map.shape.columns, program.kv_len); ++j) {
              const uint32_t word = rules::column_word(program, {b, h}, j, i / 32 * 32);
              truth |= (word >> (i % 32) & 1u) != 0 ? rules::kVisible : rules::kHidden;
            }
          }
          const bool beyond = c0 + map.shape.columns > program.kv_len;
          ASSERT_EQ(visible, truth & 1u) << "tile " << row_tile << ", " << column_tile;
          ASSERT_EQ(hidden, visible & ((truth >> 1) | (beyond ? 1u : 0u)))
              << "tile " << row_tile << ", " << column_tile;
          count += static_cast<int>(visible);
        }
        ASSERT_EQ(map.count[base + outer], count);
        total += count;
      }
      std::vector<int32_t> order(map.order + base, map.order + base + map.outer_tiles);
      EXPECT_TRUE(std::is_sorted(order.begin(), order.end(), [&](int32_t x, int32_t y) {
        const int32_t nx = map.count[base + x], ny = map.count[base + y];
        return nx != ny ? nx > ny : x < y;
      }));
      std::sort(order.begin(), order.end());
      for (int i = 0; i < map.outer_tiles; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
    }
  }
  ASSERT_EQ(map.total != nullptr, !by_rows);
  if (!by_rows) {
    EXPECT_EQ(*map.total, total);
  }
}

void expect_plan(const Mask& mask, const Problem& p) {
  for (const plan::TileShapes shapes : {kShapes, plan::TileShapes{{32, 48}, {32, 48}}}) {
    const Built built(mask, p, shapes);
    expect_map(built, built.plan.forward_rows, true);
    expect_map(built, built.plan.backward_rows, true);
    expect_map(built, built.plan.backward_columns, false);
  }
}

TEST(Plan, MapsMatchThePairs) {
  expect_plan(causal(), small_problem(300, 300));
  expect_plan(causal(), small_problem(100, 330));
  expect_plan(sliding_window(40, 10), small_problem(330, 290));
  expect_plan(full(), small_problem(33, 95));
  expect_plan(~full(), small_problem(64, 96));
}

TEST(Plan, ExactWhereClassesAloneAreNot) {
  // causal & ~causal is empty, but on the diagonal both operands are `some`.
  const Built built(causal() & ~causal(), small_problem(200, 200), kShapes);
  const plan::TileMap& map = built.plan.forward_rows;
  EXPECT_EQ(*std::max_element(map.count, map.count + map.outer_tiles), 0);
}

TEST(Plan, RandomIntervalsPerBatchAndHead) {
  std::mt19937 random(2);
  constexpr int kRows = 210, kColumns = 170;
  std::vector<int32_t> indices(2 * 2 * kColumns * 4);
  for (int32_t& value : indices) value = static_cast<int32_t>(random() % (kRows + 1));
  expect_plan(intervals(Tensor(indices.data(), DType::i32, {2, 2, kColumns, 4}), false),
              small_problem(kRows, kColumns, 2, 4));
}

// Rows of a key: [first, last).
struct Span {
  int key, first, last;
};

// The recursion of rules/key_rows.h, word for word.
void halve(std::vector<Span>& keys, size_t begin, size_t end, size_t tile_keys) {
  const auto from = keys.begin() + static_cast<std::ptrdiff_t>(begin);
  const auto to = keys.begin() + static_cast<std::ptrdiff_t>(end);
  const auto by_first = [](const Span& a, const Span& b) {
    return std::tie(a.first, a.key) < std::tie(b.first, b.key);
  };
  const auto by_last = [](const Span& a, const Span& b) {
    return std::tie(a.last, a.first, a.key) < std::tie(b.last, b.first, b.key);
  };
  std::sort(from, to, by_last);
  const int lasts = to[-1].last - from->last;
  std::vector<Span> sorted(from, to);
  std::sort(sorted.begin(), sorted.end(), by_first);
  if (sorted.back().first - sorted.front().first >= lasts) {
    std::copy(sorted.begin(), sorted.end(), from);
  }
  const size_t tiles = (end - begin + tile_keys - 1) / tile_keys;
  if (tiles == 1) return;
  halve(keys, begin, begin + tiles / 2 * tile_keys, tile_keys);
  halve(keys, begin + tiles / 2 * tile_keys, end, tile_keys);
}

// Keys that some row sees come first, halved by first or last row down to tiles.
void expect_order(std::vector<int32_t> ends, int tile_keys) {
  const int length = static_cast<int>(ends.size());
  const Mask mask = intervals(Tensor(ends.data(), DType::i32, {1, 1, length, 1}), true);
  const plan::TileShapes shapes{{64, tile_keys}, {64, tile_keys}};
  const Built built(mask.reordered(), small_problem(length, length), shapes);

  std::vector<Span> seen;
  std::vector<int> dropped;
  for (int j = 0; j < length; ++j) {
    const int last = std::min(ends[static_cast<size_t>(j)], length);
    if (last > j) {
      seen.push_back({j, j, last});
    } else {
      dropped.push_back(j);
    }
  }
  ASSERT_GT(dropped.size(), 30u);
  const int tiles = static_cast<int>(seen.size() - 1) / tile_keys + 1;
  const int groups = (tiles - 1) / (rules::kGroupKeys / tile_keys) + 1;
  for (int g = 0; g < groups; ++g) {
    const auto begin = static_cast<size_t>(tiles * g / groups * tile_keys);
    const auto end = static_cast<size_t>(tiles * (g + 1) / groups * tile_keys);
    halve(seen, begin, std::min(end, seen.size()), static_cast<size_t>(tile_keys));
  }
  std::vector<int> expected;
  for (const Span& span : seen) expected.push_back(span.key);
  expected.insert(expected.end(), dropped.begin(), dropped.end());
  const int32_t* order = built.plan.program.key_order;
  EXPECT_EQ(std::vector<int>(order, order + length), expected);
}

TEST(Plan, KeysAreOrderedByFirstAndLastRow) {
  std::mt19937 random(6);
  std::vector<int32_t> ends(700);
  for (int j = 0; j < 700; ++j)
    ends[static_cast<size_t>(j)] = j + static_cast<int>(random() % 200) - 20;
  expect_order(ends, 32);
  ends.resize(9800);  // several groups
  for (int j = 0; j < 9800; ++j)
    ends[static_cast<size_t>(j)] = j + static_cast<int>(random() % 9000) - 200;
  expect_order(ends, 128);
}

TEST(Plan, ForTheForwardPassAlone) {
  const Problem problem = small_problem(300, 330);
  const Built both(causal(), problem, kShapes);
  Built forward(causal(), problem, kShapes);
  std::fill(forward.memory.begin(), forward.memory.end(), char(0x5a));
  cpu::build_plan(forward.lowered, plan::forward_only(forward.plan));
  expect_map(forward, forward.plan.forward_rows, true);
  EXPECT_EQ(*forward.plan.backward_rows.visible, 0x5a5a5a5au);
  EXPECT_EQ(*forward.plan.backward_columns.visible, 0x5a5a5a5au);
  EXPECT_TRUE(std::equal(both.plan.forward_rows.order,
                         both.plan.forward_rows.order + both.plan.forward_rows.outer_tiles,
                         forward.plan.forward_rows.order));
}

TEST(Plan, ReorderedMasksOfSeveralHeads) {
  std::mt19937 random(8);
  constexpr int kRows = 140, kColumns = 190;
  std::vector<int32_t> indices(2 * 4 * kColumns * 4);
  for (int32_t& value : indices) value = static_cast<int32_t>(random() % (kRows + 1));
  std::vector<uint8_t> allowed(kRows * kColumns);
  for (uint8_t& one : allowed) one = random() % 40 == 0;
  const Mask runs = intervals(Tensor(indices.data(), DType::i32, {2, 4, kColumns, 4}), false);
  const Mask seldom = dense(Tensor(allowed.data(), DType::u8, {1, 1, kRows, kColumns}));
  Problem problem = small_problem(kRows, kColumns, 2, 4);
  problem.kv_heads = 2;  // two mask heads share an order
  expect_plan(runs.reordered(), problem);
  expect_plan((runs & seldom & causal()).reordered(), problem);
}

template <typename Element>
void expect_packed(DType dtype, bool broadcast_rows, bool broadcast_columns) {
  std::mt19937 random(9);
  const int rows = broadcast_rows ? 1 : 75, columns = broadcast_columns ? 1 : 133;
  std::vector<Element> allowed(static_cast<size_t>(2 * 3 * rows * columns));
  for (Element& value : allowed)
    value = static_cast<Element>(random() % 4 == 0 ? 0 : 1 + random() % 100);
  const Mask mask = dense(Tensor(allowed.data(), dtype, {2, 3, rows, columns}));
  const Built built(mask, small_problem(75, 133, 2, 3), kShapes);
  EXPECT_EQ(built.plan.program.nodes[0].op, rules::Op::kBits);
  for (int b = 0; b < 2; ++b) {
    for (int h = 0; h < 3; ++h) {
      for (int i = 0; i < 75; ++i) {
        for (int j = 0; j < 133; ++j) {
          const size_t at =
              static_cast<size_t>(((b * 3 + h) * rows + (broadcast_rows ? 0 : i)) * columns +
                                  (broadcast_columns ? 0 : j));
          const uint32_t word = rules::column_word(built.plan.program, {b, h}, j, i / 32 * 32);
          ASSERT_EQ((word >> (i % 32) & 1u) != 0, allowed[at] != 0) << i << " " << j;
        }
      }
    }
  }
  expect_map(built, built.plan.forward_rows, true);
}

TEST(Plan, PacksDenseLeavesOfEverySize) {
  expect_packed<uint8_t>(DType::u8, false, false);
  expect_packed<int16_t>(DType::i16, false, false);
  expect_packed<int32_t>(DType::i32, false, false);
  expect_packed<int64_t>(DType::i64, false, false);
  expect_packed<float>(DType::f32, false, false);
  expect_packed<double>(DType::f64, true, false);
  expect_packed<uint8_t>(DType::u8, false, true);
  expect_packed<uint8_t>(DType::u8, true, true);
}

TEST(Plan, LinearMasksHaveLinearPlans) {
  const int64_t small = plan_bytes(causal(), small_problem(1 << 14, 1 << 14));
  const int64_t large = plan_bytes(causal(), small_problem(1 << 16, 1 << 16));
  EXPECT_LT(small, 1 << 20);
  EXPECT_LT(large, 1 << 23);  // two bits a tile and its transpose
}

// Bits as kernels read them are in plans that ask for them, of masks that brought as much memory.
TEST(Plan, BakedBitsTakeLessThanDenseLeaves) {
  constexpr plan::TileShapes kBaking{{192, 128}, {64, 128}, 1}, kPlain{{192, 128}, {64, 128}};
  constexpr int kLength = 1000;
  static const std::vector<uint8_t> allowed(2 * kLength * kLength, 1);
  const auto tensor = [](int64_t batch, int64_t rows) {
    return Tensor(const_cast<uint8_t*>(allowed.data()), DType::u8, {batch, 1, rows, kLength});
  };
  const auto more = [&](const Mask& mask, const Problem& problem) {
    const rules::Program lowered = lower(mask, problem);
    const plan::Plan plan = plan::view(lowered, kBaking, reinterpret_cast<void*>(256));
    const int64_t bytes =
        plan::bytes_needed(lowered, kBaking) - plan::bytes_needed(lowered, kPlain);
    EXPECT_EQ(plan.forward_rows.baked != nullptr, bytes > 0);
    EXPECT_EQ(plan.backward_columns.baked != nullptr, bytes > 0);
    EXPECT_EQ(plan.backward_rows.baked, nullptr);
    return bytes;
  };
  const Problem two = small_problem(kLength, kLength, 2);
  const int64_t pairs = int64_t{kLength} * kLength;
  EXPECT_EQ(more(causal(), two), 0);
  EXPECT_EQ(more(dense(tensor(2, 1)), two), 0);
  EXPECT_GT(more(dense(tensor(2, kLength)) & causal(), two), pairs / 2);
  EXPECT_LT(more(dense(tensor(2, kLength)) & causal(), two), pairs * 2 / 3);
  EXPECT_GT(more(dense(tensor(1, kLength)), two), pairs / 4);  // one place for both

  std::vector<int32_t> ids(9 * kLength);
  const Tensor view(ids.data(), DType::i32, {9, 1, kLength});
  EXPECT_EQ(
      more(dense(tensor(1, kLength)) & documents(view, view), small_problem(kLength, kLength, 9)),
      0);
}

TEST(Plan, EmptySizes) {
  for (const auto& [q, k] : {std::pair{0, 50}, {50, 0}, {0, 0}})
    expect_plan(causal(), small_problem(q, k));
}

TEST(Plan, StatisticsCountPairs) {
  const MaskStatistics found = mask_statistics(causal(), small_problem(300, 300), 64, 64);
  EXPECT_EQ(found.pairs, 300 * 300);
  EXPECT_EQ(found.visible_pairs, 300 * 301 / 2);
  EXPECT_EQ(found.tiles, 25);
  EXPECT_EQ(found.all_tiles, 10);
  EXPECT_EQ(found.some_tiles, 5);
}

TEST(Plan, IntervalsFromDenseRoundTrip) {
  std::mt19937 random(4);
  constexpr int kRows = 61, kColumns = 61;
  for (const auto& [causal_form, n] : {std::pair{true, 1}, {true, 2}, {false, 2}, {false, 4}}) {
    std::vector<int32_t> indices(static_cast<size_t>(kColumns * n));
    for (int32_t& value : indices) value = static_cast<int32_t>(random() % (kRows + 1));
    const Mask mask =
        intervals(Tensor(indices.data(), DType::i32, {1, 1, kColumns, n}), causal_form);
    std::vector<uint8_t> allowed(kRows * kColumns), again(kRows * kColumns);
    const Tensor dense_view(allowed.data(), DType::u8, {1, 1, kRows, kColumns});
    mask_to_dense(mask, small_problem(kRows, kColumns), dense_view);
    std::vector<int32_t> wide(kColumns * 4, -1);
    const int found = intervals_from_dense(dense_view, causal_form,
                                           Tensor(wide.data(), DType::i32, {1, 1, kColumns, 4}));
    ASSERT_LE(found, n);
    Tensor view(wide.data(), DType::i32, {1, 1, kColumns, 4});
    view.shape[3] = found;
    mask_to_dense(intervals(view, causal_form), small_problem(kRows, kColumns),
                  Tensor(again.data(), DType::u8, {1, 1, kRows, kColumns}));
    EXPECT_EQ(allowed, again);
  }
}

TEST(Plan, IntervalsFromDenseNamesTheColumn) {
  std::vector<uint8_t> allowed(20 * 20, 1);
  for (int row : {1, 5, 9}) allowed[static_cast<size_t>(row * 20 + 7)] = 0;
  std::vector<int32_t> wide(20 * 4);
  const Tensor indices(wide.data(), DType::i32, {1, 1, 20, 4});
  try {
    intervals_from_dense(Tensor(allowed.data(), DType::u8, {1, 1, 20, 20}), false, indices);
    FAIL();
  } catch (const InvalidValue& error) {
    EXPECT_NE(std::string(error.what()).find("key column 7"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("3 runs"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace anymask
