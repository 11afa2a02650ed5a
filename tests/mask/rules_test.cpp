// The rules against definitions written out pair by pair.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"
#include "mask/lower.h"
#include "problem.h"
#include "rules/key_rows.h"

namespace anymask {
namespace {

using Allowed = std::function<bool(int batch, int head, int row, int column)>;

// The first row that sees a key and the one behind the last.
rules::KeyRows true_rows(const rules::Program& program, const Allowed& allowed, int batch, int head,
                         int column) {
  rules::KeyRows rows = {program.q_len, 0};
  for (int row = 0; row < program.q_len; ++row) {
    if (!allowed(batch, head, row, column)) continue;
    rows = {std::min(rows.first, row), row + 1};
  }
  return rows;
}

// A key's rows may only be more than those that see it.
void expect_key_rows(rules::Program program, const Allowed& allowed, bool exact) {
  program.order_divisor = 1;
  for (int b = 0; b < program.batches; ++b) {
    for (int h = 0; h < program.heads; ++h) {
      for (int column = 0; column < program.kv_len; ++column) {
        const rules::KeyRows truth = true_rows(program, allowed, b, h, column);
        const rules::KeyRows found = rules::rows_of_order(program, b, h, column);
        ASSERT_LE(found.first, truth.first) << "column " << column;
        ASSERT_GE(found.last, truth.last) << "column " << column;
        if (!exact) continue;
        ASSERT_EQ(found.first, truth.first) << "column " << column;
        ASSERT_EQ(found.last, truth.last) << "column " << column;
      }
    }
  }
}

// Asks the rules about every pair and about random tiles and compares with the definition.
void expect_mask(const Mask& mask, const Problem& problem, const Allowed& allowed) {
  const rules::Program program = lower(mask, problem);
  expect_key_rows(program, allowed, false);
  std::mt19937 random(7);
  for (int b = 0; b < program.batches; ++b) {
    for (int h = 0; h < program.heads; ++h) {
      const rules::Place place{b, h};
      for (int row = 0; row < program.q_len; ++row) {
        for (int column = 0; column < program.kv_len; ++column) {
          const uint32_t word = rules::column_word(program, place, column, row / 32 * 32);
          ASSERT_EQ((word >> (row % 32) & 1u) != 0, allowed(b, h, row, column))
              << "batch " << b << " head " << h << " row " << row << " column " << column;
        }
      }
      for (int trial = 0; trial < 200; ++trial) {
        const auto range = [&](int length) {
          int a = static_cast<int>(random() % static_cast<unsigned>(length));
          int z = static_cast<int>(random() % static_cast<unsigned>(length));
          if (a > z) std::swap(a, z);
          return std::pair{a, z + 1};
        };
        const auto [r0, r1] = range(program.q_len);
        const auto [c0, c1] = range(program.kv_len);
        rules::TileClass truth = 0;
        for (int row = r0; row < r1; ++row) {
          for (int column = c0; column < c1; ++column) {
            truth |= allowed(b, h, row, column) ? rules::kVisible : rules::kHidden;
          }
        }
        const rules::TileClass found = rules::tile_class(program, place, {r0, r1, c0, c1});
        ASSERT_EQ(found & truth, truth) << "rows " << r0 << ".." << r1 << " columns " << c0 << ".."
                                        << c1 << ": a class may only say more, never less";
      }
    }
  }
}

TEST(Rules, CausalIsAlignedBottomRight) {
  for (const auto& [q, k] : {std::pair{70, 70}, {33, 90}, {90, 33}, {1, 1}}) {
    expect_mask(causal(), small_problem(q, k),
                [q = q, k = k](int, int, int i, int j) { return j <= i + k - q; });
  }
}

TEST(Rules, SlidingWindow) {
  expect_mask(sliding_window(5, 3), small_problem(60, 75),
              [](int, int, int i, int j) { return j >= i + 15 - 5 && j <= i + 15 + 3; });
  expect_mask(sliding_window(-1, 2), small_problem(40, 40),
              [](int, int, int i, int j) { return j <= i + 2; });
}

TEST(Rules, PrefixWithALengthPerBatchEntry) {
  std::vector<int64_t> lengths{0, 13, 64};
  expect_mask(
      prefix_lm(Tensor(lengths.data(), DType::i64, {3})), small_problem(64, 64, 3),
      [&](int b, int, int i, int j) { return j <= i || j < lengths[static_cast<size_t>(b)]; });
}

TEST(Rules, DocumentsByIdsAndByLengthsAgree) {
  std::vector<int32_t> lengths{0, 11, 12, 50, 64};
  std::vector<int32_t> ids;
  for (int i = 0; i < 80; ++i) ids.push_back(i < 11 ? 0 : i < 12 ? 1 : i < 50 ? 2 : i < 64 ? 3 : 4);
  const auto same = [&](int, int, int i, int j) {
    return ids[static_cast<size_t>(i)] == ids[static_cast<size_t>(j)];
  };
  expect_mask(documents(Tensor(ids.data(), DType::i32, {80})), small_problem(80, 80), same);
  expect_mask(cumulative_documents(Tensor(lengths.data(), DType::i32, {5})), small_problem(80, 80),
              same);
}

TEST(Rules, IntervalsInEveryForm) {
  std::mt19937 random(11);
  constexpr int kRows = 70, kColumns = 66;
  for (const auto& [causal_form, n] : {std::pair{true, 1}, {true, 2}, {false, 2}, {false, 4}}) {
    std::vector<int32_t> indices(static_cast<size_t>(2 * 2 * kColumns * n));
    for (int32_t& value : indices) value = static_cast<int32_t>(random() % (kRows + 20)) - 10;
    const Tensor tensor(indices.data(), DType::i32, {2, 2, kColumns, n});
    expect_mask(intervals(tensor, causal_form), small_problem(kRows, kColumns, 2, 4),
                [&, causal_form = causal_form, n = n](int b, int h, int i, int j) {
                  const int32_t* x =
                      indices.data() + static_cast<size_t>(((b * 2 + h) * kColumns + j) * n);
                  bool masked = false;
                  if (n == 1) masked = i >= x[0];
                  if (n == 2 && causal_form) masked = x[0] <= i && i < x[1];
                  if (n == 2 && !causal_form) masked = i >= x[0] || i < x[1];
                  if (n == 4) masked = (x[0] <= i && i < x[1]) || (x[2] <= i && i < x[3]);
                  return !masked && (!causal_form || j <= i + kColumns - kRows);
                });
  }
}

TEST(Rules, BlocksOfUnequalSides) {
  std::vector<uint8_t> block{1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1};  // 4 x 3
  expect_mask(
      blocks(Tensor(block.data(), DType::u8, {1, 1, 4, 3}), 16, 32), small_problem(61, 70),
      [&](int, int, int i, int j) { return block[static_cast<size_t>(i / 16 * 3 + j / 32)] != 0; });
}

TEST(Rules, DenseOfFloatsTakesMinusZeroForZero) {
  std::mt19937 random(3);
  std::vector<float> allowed(40 * 37);
  for (float& value : allowed) value = random() % 3 == 0 ? -0.0f : random() % 2 == 0 ? 0.0f : -2.0f;
  expect_mask(
      dense(Tensor(allowed.data(), DType::f32, {40, 37})), small_problem(40, 37),
      [&](int, int, int i, int j) { return allowed[static_cast<size_t>(i * 37 + j)] != 0; });
}

TEST(Rules, DenseBroadcastOverRows) {
  std::vector<uint8_t> keep(2 * 50);
  for (size_t i = 0; i < keep.size(); ++i) keep[i] = i % 7 != 3;
  expect_mask(dense(Tensor(keep.data(), DType::u8, {2, 1, 1, 50})), small_problem(45, 50, 2),
              [&](int b, int, int, int j) { return keep[static_cast<size_t>(b * 50 + j)] != 0; });
}

TEST(Rules, IdsPerHead) {
  std::mt19937 random(5);
  std::vector<int32_t> eq(2 * 40), ek(2 * 48);
  for (int32_t& value : eq) value = static_cast<int32_t>(random() % 6) - 4;
  for (int32_t& value : ek) value = static_cast<int32_t>(random() % 6) - 4;
  expect_mask(
      ids(Tensor(eq.data(), DType::i32, {1, 2, 40}), Tensor(ek.data(), DType::i32, {1, 2, 48})),
      small_problem(40, 48, 1, 2), [&](int, int h, int i, int j) {
        const int32_t q = eq[static_cast<size_t>(h * 40 + i)];
        return q >= 0 || q == ek[static_cast<size_t>(h * 48 + j)];
      });
}

TEST(Rules, TreesCombine) {
  const Mask tree = (causal() & ~sliding_window(4, 0)) | (prefix_lm(3) & ~causal()) |
                    ~(sliding_window(20, 20) | ~full());
  expect_mask(tree, small_problem(64, 64), [](int, int, int i, int j) {
    const bool causal = j <= i, window = j >= i - 4 && j <= i, prefix = j <= i || j < 3;
    const bool wide = j >= i - 20 && j <= i + 20;
    return (causal && !window) || (prefix && !causal) || !wide;
  });
}

TEST(Rules, RowsOfAKeyAreExactForRunsOfRows) {
  std::mt19937 random(13);
  constexpr int kRows = 75, kColumns = 90;
  std::vector<int32_t> indices(kColumns * 4);
  for (int32_t& value : indices) value = static_cast<int32_t>(random() % (kRows + 20)) - 10;
  const int32_t* all = indices.data();
  const Problem problem = small_problem(kRows, kColumns);
  const auto tensor = [&](int n) {
    return Tensor(indices.data(), DType::i32, {1, 1, kColumns, n});
  };
  const auto exact = [&](const Mask& mask, const auto& allowed) {
    expect_key_rows(
        lower(mask, problem), [&](int, int, int i, int j) { return allowed(i, j); }, true);
  };
  const auto is_causal = [](int i, int j) { return j <= i + kColumns - kRows; };
  const auto evicted = [&](int i, int j) { return i >= all[j]; };
  const auto outside = [&](int i, int j) { return i >= all[2 * j] || i < all[2 * j + 1]; };
  const auto in_two = [&](int i, int j) {
    const int32_t* x = all + 4 * j;
    return (x[0] <= i && i < x[1]) || (x[2] <= i && i < x[3]);
  };
  // Evicted before it is reached: such a key is seen by nobody.
  exact(intervals(tensor(1), true),
        [&](int i, int j) { return is_causal(i, j) && !evicted(i, j); });
  exact(intervals(tensor(2), false), [&](int i, int j) { return !outside(i, j); });
  exact(~intervals(tensor(2), false), outside);
  exact(intervals(tensor(4), false), [&](int i, int j) { return !in_two(i, j); });
  exact(~intervals(tensor(4), false), in_two);
  exact(~causal(), [&](int i, int j) { return !is_causal(i, j); });
  exact(~sliding_window(9, 4) | full(), [](int, int) { return true; });
}

TEST(Rules, RunWordIsExactAtEveryEdge) {
  for (int begin = -3; begin < 40; ++begin) {
    for (int end = -3; end < 40; ++end) {
      uint32_t truth = 0;
      for (int r = 0; r < 32; ++r) truth |= (begin <= r && r < end ? 1u : 0u) << r;
      ASSERT_EQ(rules::run_word(begin, end, 0), truth) << begin << " " << end;
    }
  }
}

}  // namespace
}  // namespace anymask
