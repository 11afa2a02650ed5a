// Which variant of the forward kernel serves a call: decided before the mask is known, the same for
// a plan as for the call.
#include "cuda/forward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "anymask/attention.hpp"
#include "cuda/backend.h"

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
  EXPECT_FALSE(has_few_rows(problem(133, 1, 1)));
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
    EXPECT_EQ(count(depth, value_depth, tile(problem(1, 8, 2048, depth, value_depth))), each);
    EXPECT_EQ(count(depth, value_depth, tile(problem(1, 64, 2048, depth, value_depth))), each);
  }
  for (const int depth : {192, 256}) {
    EXPECT_EQ(count(depth, depth, tile(problem(1, 8, 2048, depth, depth))), depth == 192 ? 8 : 20);
  }
  EXPECT_EQ(all.size(), 2 * (20 + 20 + 8) + 8 + 20);
}

}  // namespace
}  // namespace anymask::cuda
