// Which variant of the forward kernel serves a call: decided before the mask is known, the same for
// a plan as for the call.
#include "cuda/forward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "anymask/attention.hpp"
#include "cuda/backend.h"
#include "cuda/device/key_cuts.h"

namespace anymask::cuda {
namespace {

using Tile = std::pair<int32_t, int32_t>;  // rows, columns

Tile tile(const Problem& problem) {
  const plan::TileShape shape = forward_tile_shape(problem);
  return {shape.rows, shape.columns};
}

Problem problem(int64_t batch, int64_t heads, int64_t q_len, int64_t head_dim = 128,
                int64_t v_head_dim = 128) {
  return {.batch = batch,
          .q_heads = heads,
          .kv_heads = heads,
          .q_len = q_len,
          .kv_len = 1000,
          .head_dim = head_dim,
          .v_head_dim = v_head_dim,
          .dtype = DType::bf16,
          .device = {DeviceType::cuda, 0}};
}

TEST(Forward, FewRowsLeaveEveryBlockOneItem) {
  EXPECT_TRUE(has_few_rows(problem(1, 8, 2048)));
  EXPECT_TRUE(has_few_rows(problem(1, 132, 128)));
  EXPECT_FALSE(has_few_rows(problem(1, 132, 129)));
  EXPECT_FALSE(has_few_rows(problem(1, 133, 128)));
  EXPECT_TRUE(has_few_rows(problem(133, 1, 1))) << "a single strip, however many";
  EXPECT_TRUE(has_few_rows(problem(133, 1, 16)));
  EXPECT_FALSE(has_few_rows(problem(133, 1, 17)));
  EXPECT_FALSE(has_few_rows(problem(1, 12, 2048))) << "132 items of 192 rows, 192 of 128";
}

TEST(Forward, FewRowsHaveSmallerTilesWhereOthersAreLarger) {
  const int64_t depths[] = {8, 64, 72, 128, 136, 192, 200, 256};
  for (const int64_t head_dim : depths) {
    for (const int64_t v_head_dim : depths) {
      SCOPED_TRACE(std::to_string(head_dim) + ", " + std::to_string(v_head_dim));
      const Tile few = tile(problem(1, 8, 2048, head_dim, v_head_dim));
      const Tile many = tile(problem(1, 64, 2048, head_dim, v_head_dim));
      if (head_dim <= 192 && v_head_dim <= 128) {
        EXPECT_EQ(few, Tile(128, 128));
        EXPECT_EQ(many.first, 192);
      } else {
        EXPECT_EQ(few, many);
      }
    }
  }
}

TEST(Forward, PlansAreMadeForTheCallsTile) {
  for (const int64_t head_dim : {128, 256}) {
    Problem few = problem(1, 2, 5000, head_dim, head_dim);
    Problem many = problem(2, 2, 5000, head_dim, head_dim);
    few.kv_len = many.kv_len = 50000;  // more than rounding to 256 bytes
    for (const Problem& one : {few, many}) {
      const plan::TileShape planned = tile_shapes(one).forward;
      EXPECT_EQ(Tile(planned.rows, planned.columns), tile(one));
    }
    EXPECT_EQ(plan_bytes(causal(), few) == plan_bytes(causal(), many), head_dim == 256);
  }
}

// Element types and score options, which a plan does not know, must not matter to the tile; and
// both tiles of a depth are there for all of them.
TEST(Forward, ShippedVariantsHaveTheTilesOfPlans) {
  const std::vector<KernelConfig> all = forward_kernels();
  const auto count = [&](int depth, int value_depth, Tile with) {
    return std::count_if(all.begin(), all.end(), [&](const KernelConfig& config) {
      const auto& values = config.values;
      return values[1] == depth && values[2] == value_depth &&
             Tile(64 * values[3], values[4]) == with;
    });
  };
  for (const auto& [depth, value_depth] : {std::pair{64, 64}, {128, 128}, {192, 128}}) {
    const int each = depth == 192 ? 8 : 20;
    const Tile few = tile(problem(1, 8, 2048, depth, value_depth));
    EXPECT_EQ(count(depth, value_depth, few), 2 * each) << "a single strip has it too";
    EXPECT_EQ(count(depth, value_depth, tile(problem(1, 64, 2048, depth, value_depth))), each);
  }
  for (const int depth : {192, 256}) {
    EXPECT_EQ(count(depth, depth, tile(problem(1, 8, 2048, depth, depth))), depth == 192 ? 8 : 20);
  }
  EXPECT_EQ(all.size(), 3 * (20 + 20 + 8) + 8 + 20);
}

TEST(Forward, APlanForAnotherTileHasAnotherSize) {
  for (const int64_t q_len : {17, 100, 128}) {
    EXPECT_NE(plan_bytes(causal(), problem(1, 132, q_len)),
              plan_bytes(causal(), problem(1, 133, q_len)));
    EXPECT_EQ(plan_bytes(causal(), problem(1, 132, q_len)),
              plan_bytes(causal(), problem(132, 1, q_len)));
  }
}

// Every key tile of every row tile is with exactly one block, which has its parts in a row.
void expect_all_shared(const std::vector<int>& counts, int blocks) {
  std::vector<int> starts{0};
  int longest = 0;
  for (const int count : counts) {
    starts.push_back(starts.back() + count + kPartOverhead);
    longest = std::max(longest, count + kPartOverhead);
  }
  const int rows = static_cast<int>(counts.size());
  const int share = share_of(starts.back(), longest, rows, blocks);
  if (share == 0) {
    EXPECT_LE(rows, blocks);
    return;
  }
  EXPECT_GE(static_cast<int64_t>(share) * blocks, starts.back());
  std::vector<int> tiles(static_cast<size_t>(blocks)), cut_ends(tiles), cut_begins(tiles);
  int block = 0;  // that the part before was with
  for (int row = 0; row < rows; ++row) {
    const int count = counts[static_cast<size_t>(row)], start = starts[static_cast<size_t>(row)];
    const RowCuts cuts = cuts_of(start, count, share, blocks);
    EXPECT_GE(cuts.first_block, block) << "a block's row tiles are not next to each other";
    EXPECT_EQ(cuts.begin_of(0, start, share), 0);
    for (int part = 0; part < cuts.parts; ++part) {
      block = cuts.first_block + part;
      ASSERT_LT(block, blocks);
      const int begin = cuts.begin_of(part, start, share);
      const bool last = part + 1 == cuts.parts;
      const int end = last ? count : cuts.begin_of(part + 1, start, share);
      EXPECT_GE(end - begin, cuts.parts > 1 ? kLeastPart : 0);
      const auto at = static_cast<size_t>(block);
      tiles[at] += end - begin;
      cut_begins[at] += part > 0;
      cut_ends[at] += part == 0 && !last;
    }
  }
  for (size_t b = 0; b < tiles.size(); ++b) {
    EXPECT_LE(tiles[b], share + 2 * kLeastPart);
    EXPECT_LE(cut_begins[b], 1) << "a block has one place for what another one began";
    EXPECT_LE(cut_ends[b], 1);
  }
}

TEST(Forward, KeyTilesOfFewRowsAreSharedOut) {
  std::vector<int> causal;
  for (int head = 0; head < 8; ++head) {
    for (int row = 1; row <= 16; ++row) causal.push_back(row);
  }
  expect_all_shared(causal, 132);
  expect_all_shared(std::vector<int>(32, 256), 132);
  expect_all_shared({1 << 20}, 132);
  expect_all_shared({0}, 132);
  expect_all_shared(std::vector<int>(132, 0), 114);
  std::mt19937 random(1);
  const auto below = [&](int end) {
    return static_cast<int>(random() % static_cast<unsigned>(end));
  };
  for (int i = 0; i < 3000; ++i) {
    std::vector<int> counts(static_cast<size_t>(1 + below(kMostCutStrips)));
    const int most = 1 << below(10);
    for (int& count : counts) count = below(3) == 0 ? 0 : below(most + 1);
    expect_all_shared(counts, 1 + below(132));
  }
}

TEST(Forward, EvenlyLongRowTilesStayWhole) {
  EXPECT_EQ(share_of(128 * 17, 17, 128, 132), 0);
  EXPECT_EQ(share_of(4 * 4, 4, 4, 132), 0) << "too short to be cut";
  EXPECT_GT(share_of(128 * 17, 17, 128, 114), 0) << "more row tiles than blocks";
  EXPECT_EQ(share_of(64 * 17, 17, 64, 132), 9);
  EXPECT_EQ(share_of(128 * 5, 9, 128, 132), 0) << "joining parts would take longer";
}

}  // namespace
}  // namespace anymask::cuda
