// Dynamic masks against sorting every prefix.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"
#include "problem.h"

namespace anymask {
namespace {

void expect_selection(std::vector<float> scores, int64_t keep, int q_len, int heads = 1) {
  const int kv_len = static_cast<int>(scores.size()) / heads;
  std::vector<int32_t> ends(scores.size(), -1);
  const Tensor indices(ends.data(), DType::i32, {1, heads, kv_len, 1});
  top_keys(Tensor(scores.data(), DType::f32, {1, heads, kv_len}), keep, q_len, indices);
  const Problem problem = small_problem(q_len, kv_len, 1, heads);
  std::vector<uint8_t> allowed(static_cast<size_t>(heads * q_len * kv_len));
  const Mask mask = intervals(indices, true);
  const MaskShape shape = mask_shape(mask, problem);
  mask_to_dense(mask, problem, Tensor(allowed.data(), DType::u8, {1, shape.heads, q_len, kv_len}));
  for (int h = 0; h < heads; ++h) {
    for (int row = 0; row < q_len; ++row) {
      const int seen = std::clamp(row + kv_len - q_len + 1, 0, kv_len);
      std::vector<int> keys(static_cast<size_t>(seen));
      std::iota(keys.begin(), keys.end(), 0);
      const auto score = [&](int j) {
        const float value = scores[static_cast<size_t>(h * kv_len + j)];
        return std::isnan(value) ? -INFINITY : value;
      };
      std::stable_sort(keys.begin(), keys.end(), [&](int a, int b) { return score(a) > score(b); });
      std::vector<uint8_t> truth(static_cast<size_t>(kv_len), 0);
      for (int n = 0; n < std::min<int>(static_cast<int>(keep), seen); ++n) {
        truth[static_cast<size_t>(keys[static_cast<size_t>(n)])] = 1;
      }
      for (int j = 0; j < kv_len; ++j) {
        ASSERT_EQ(allowed[static_cast<size_t>((h * q_len + row) * kv_len + j)],
                  truth[static_cast<size_t>(j)])
            << "head " << h << " row " << row << " key " << j;
      }
    }
  }
}

TEST(TopKeys, RandomScoresWithManyTies) {
  std::mt19937 random(1);
  for (const int keep : {0, 1, 5, 40, 200}) {
    std::vector<float> scores(2 * 90);
    for (float& value : scores) value = static_cast<float>(random() % 9) - 4.0f;
    expect_selection(scores, keep, 90, 2);
    expect_selection(scores, keep, 50, 2);
    expect_selection(scores, keep, 120, 2);
  }
}

TEST(TopKeys, EqualScoresKeepTheFirst) { expect_selection(std::vector<float>(70, 0.5f), 7, 70); }

TEST(TopKeys, MinusZeroTiesWithZeroAndNanIsLast) {
  expect_selection({-0.0f, 0.0f, NAN, -0.0f, 1.0f, NAN, -2.0f, 0.0f}, 3, 8);
}

TEST(TopKeys, RefusesWrongArguments) {
  std::vector<float> scores(8);
  std::vector<int32_t> ends(8);
  const Tensor s(scores.data(), DType::f32, {1, 1, 8});
  EXPECT_THROW(top_keys(s, -1, 8, Tensor(ends.data(), DType::i32, {1, 1, 8, 1})), InvalidValue);
  EXPECT_THROW(top_keys(s, 2, 8, Tensor(ends.data(), DType::i32, {1, 1, 7, 1})), InvalidValue);
  EXPECT_THROW(top_keys(s, 2, 8, Tensor(ends.data(), DType::f32, {1, 1, 8, 1})), InvalidType);
  const Tensor good(ends.data(), DType::i32, {1, 1, 8, 1});
  EXPECT_THROW(top_keys(s, 2, -1, good), InvalidValue);
  EXPECT_THROW(top_keys(Tensor(scores.data(), DType::f64, {1, 1, 4}), 2, 8, good), InvalidType);
  Tensor gaps = good;
  gaps.stride[2] = 2;
  EXPECT_THROW(top_keys(s, 2, 8, gaps), InvalidValue);

  const Device gpu = {DeviceType::cuda, 0};
  const Tensor there(scores.data(), DType::f32, {1, 1, 8}, gpu);
  EXPECT_THROW(top_keys(there, 2, 8, good), InvalidType);
  const Tensor ends_there(ends.data(), DType::i32, {1, 1, 8, 1}, gpu);
  EXPECT_THROW(top_keys(there, 2, 8, ends_there), InvalidValue);  // no workspace
  EXPECT_EQ(top_keys_workspace_bytes(s), 0);
  EXPECT_GT(top_keys_workspace_bytes(there), 0);
}

}  // namespace
}  // namespace anymask
