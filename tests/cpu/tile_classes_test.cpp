// What summaries say of rectangles of tiles, against the pairs: sound always, and so sharp for
// common masks that a plan need not look at the pairs of empty and full tiles.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"
#include "cpu/random_masks.h"
#include "cpu/tile_classes.h"
#include "mask/lower.h"
#include "problem.h"

namespace anymask {
namespace {

constexpr plan::TileShape kShape = {16, 24};

rules::TileClass truth_of(const rules::Program& program, rules::Place place,
                          const rules::Tile& tile) {
  rules::TileClass found = 0;
  for (int row = tile.row_begin; row < tile.row_end; ++row) {
    for (int column = tile.column_begin; column < tile.column_end; ++column) {
      const uint32_t word = rules::column_word(program, place, column, row / 32 * 32);
      found |= (word >> row % 32 & 1u) != 0 ? rules::kVisible : rules::kHidden;
    }
  }
  return found;
}

// Calls visit(single tile, what is known, truth) for all rectangles of a mask.
template <class Visit>
void each_rectangle(const rules::Program& program, const Visit& visit) {
  const cpu::TileClasses classes(program, kShape);
  const auto each_span = [](const cpu::Spans& spans, const auto& use) {
    for (int level = 0; level < spans.levels(); ++level) {
      for (int i = 0; i < spans.count(level); ++i) use(cpu::Span{level, i});
    }
  };
  for (int p = 0; p < program.batches * program.heads; ++p) {
    const rules::Place place = {p / program.heads, p % program.heads};
    each_span(classes.rows(), [&](cpu::Span rows) {
      each_span(classes.keys(), [&](cpu::Span keys) {
        const rules::Tile tile = classes.tile(rows, keys);
        ASSERT_LT(tile.row_begin, tile.row_end);
        ASSERT_LT(tile.column_begin, tile.column_end);
        SCOPED_TRACE(::testing::Message()
                     << "rows " << tile.row_begin << ".." << tile.row_end << " keys "
                     << tile.column_begin << ".." << tile.column_end);
        visit(rows.level + keys.level == 0, classes.known(place, rows, keys),
              truth_of(program, place, tile));
      });
    });
  }
}

void expect_sound(const rules::Program& program) {
  each_rectangle(program, [](bool, rules::Known known, rules::TileClass truth) {
    ASSERT_EQ(truth & ~rules::may_hold(known), 0u) << "holds what it may not";
    ASSERT_EQ(rules::surely_holds(known) & ~truth, 0u) << "does not hold what it surely does";
  });
}

void expect_exact(const Mask& mask, int q_len, int kv_len) {
  const rules::Program program = lower(mask, small_problem(q_len, kv_len, 1, 2));
  each_rectangle(program, [](bool single, rules::Known known, rules::TileClass truth) {
    if (single) {
      ASSERT_EQ(rules::may_hold(known), truth);
    }
  });
}

TEST(TileClasses, RandomTreesAreSound) {
  for (unsigned seed = 0; seed < 150; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    RandomMasks random(seed);
    const int q_len = random.between(1, 150), kv_len = random.between(1, 150);
    const Mask mask = random.tree(random.between(1, 4), q_len, kv_len);
    rules::Program program = lower(mask, small_problem(q_len, kv_len, 1, 2));
    expect_sound(program);
    // In another order, one for both heads.
    std::vector<int32_t> order(static_cast<size_t>(kv_len));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    program.key_order = order.data();
    program.order_divisor = program.heads;
    expect_sound(program);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(TileClasses, ExactForCommonMasks) {
  std::vector<int32_t> document_ends, prefix_starts, dropped, ids;
  for (int j = 0; j < 100; ++j) {
    const int end = j < 37 ? 37 : j < 40 ? 40 : 100;
    document_ends.push_back(end);
    prefix_starts.insert(prefix_starts.end(), {end, j});
    const int first = j / 3 == 12 ? 80 : 0, second = j / 3 == 20 ? 64 : 0;
    dropped.insert(dropped.end(), {first, first + first / 8, second, second + second / 8});
    ids.push_back(end);
  }
  expect_exact(intervals(Tensor(document_ends.data(), DType::i32, {1, 1, 100, 1}), true), 100, 100);
  expect_exact(intervals(Tensor(prefix_starts.data(), DType::i32, {1, 1, 100, 2}), false), 100,
               100);
  expect_exact(intervals(Tensor(dropped.data(), DType::i32, {1, 1, 100, 4}), false), 100, 100);
  expect_exact(documents(Tensor(ids.data(), DType::i32, {1, 100})), 100, 100);
  expect_exact(causal() & sliding_window(20, 0), 90, 130);
  expect_exact(~prefix_lm(33), 70, 70);
}

}  // namespace
}  // namespace anymask
