// Scores to select keys by, and the comparison with what the CPU backend selects.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "anymask/mask.hpp"

namespace anymask::cuda {

// Scores [batch, heads, kv_len] over memory with gaps between the keys, heads and entries.
struct Selection {
  const char* name;
  int64_t batch, heads, kv_len, q_len, keep;
  float (*score)(std::mt19937&, int64_t key);
  int64_t gap = 0;

  int64_t key_stride() const { return 1 + gap; }
  int64_t head_stride() const { return kv_len * key_stride() + gap; }
  int64_t keys() const { return batch * heads * kv_len; }

  std::vector<float> scores() const {
    std::mt19937 random(static_cast<unsigned>(kv_len * 131 + keep));
    std::vector<float> all(static_cast<size_t>(batch * (heads * head_stride() + gap)), NAN);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t key = 0; key < kv_len; ++key) {
          const int64_t at =
              b * (heads * head_stride() + gap) + h * head_stride() + key * key_stride();
          all[static_cast<size_t>(at)] = score(random, key);
        }
      }
    }
    return all;
  }

  Tensor view(const void* memory, Device device = {}) const {
    Tensor tensor(const_cast<void*>(memory), DType::f32, {batch, heads, kv_len}, device);
    tensor.stride[0] = heads * head_stride() + gap;
    tensor.stride[1] = head_stride();
    tensor.stride[2] = key_stride();
    return tensor;
  }
  Tensor ends_view(void* memory, Device device = {}) const {
    return Tensor(memory, DType::i32, {batch, heads, kv_len, 1}, device);
  }
};

inline float normal(std::mt19937& random, int64_t) {
  return std::normal_distribution<float>()(random);
}
inline float one_of_nine(std::mt19937& random, int64_t) {
  return static_cast<float>(random() % 9) - 4.0f;
}
inline float equal(std::mt19937&, int64_t) { return 0.5f; }
inline float rising(std::mt19937&, int64_t key) { return static_cast<float>(key); }
inline float falling(std::mt19937&, int64_t key) { return -static_cast<float>(key); }
inline float special(std::mt19937& random, int64_t) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kValues[] = {0.0f,       -0.0f,  NAN,     -NAN, kInfinity,
                               -kInfinity, 1e-42f, -1e-42f, 2.0f};
  return kValues[random() % std::size(kValues)];
}
// A few good keys far apart to the left, the rest to the right of them or between them in turns:
// pointers with far to go.
inline float sparse(std::mt19937& random, int64_t key) {
  if (key % 61 == 0) return 10.0f;
  return key > 3000 ? static_cast<float>(random() % 1000) / 500.0f : normal(random, key) - 9.0f;
}

inline const Selection kSelections[] = {
    {"normal", 2, 3, 1301, 1301, 40, normal},
    {"fewer queries", 1, 2, 1000, 333, 64, normal},
    {"more queries", 1, 2, 700, 1500, 300, normal},
    {"one query", 1, 2, 900, 1, 300, normal},
    {"no queries", 1, 1, 300, 0, 20, normal},
    {"ties", 2, 2, 1200, 1200, 200, one_of_nine, 2},
    {"all equal", 1, 2, 1111, 1111, 100, equal},
    {"rising", 1, 1, 1500, 1500, 129, rising},
    {"falling", 1, 1, 1500, 1500, 129, falling},
    {"falling, keep 1", 1, 1, 700, 700, 1, falling},
    {"special", 1, 3, 1000, 1000, 77, special, 1},
    {"several tiles", 1, 2, 9001, 9001, 1500, normal},
    {"several tiles, ties", 1, 1, 8193, 8193, 600, one_of_nine},
    {"sparse", 1, 1, 6000, 6000, 50, sparse},
    {"keep 0", 1, 2, 300, 300, 0, normal},
    {"keep 1", 1, 2, 2000, 2000, 1, normal},
    {"keep all but one", 1, 2, 300, 300, 299, normal},
    {"keep all", 1, 2, 300, 300, 300, one_of_nine},
    {"keep more than there are", 1, 2, 300, 200, 1000, normal},
    {"one key", 3, 1, 1, 1, 1, normal},
    {"one key, none kept", 3, 1, 1, 5, 0, normal},
    {"no keys", 2, 2, 0, 4, 3, normal},
    {"no heads", 2, 0, 10, 10, 3, normal},
};

inline const Selection kLargeSelections[] = {
    {"32768", 1, 8, 32768, 32768, 1024, normal},
    {"131075", 2, 2, 131075, 131075, 2048, normal},
    {"131075, rising", 1, 1, 131075, 131075, 2048, rising},
    {"131075, ties", 1, 1, 131075, 131075, 777, one_of_nine},
    {"262144, sparse", 1, 3, 262144, 262144, 1000, sparse},
    {"many heads", 8, 64, 2048, 2048, 256, normal},
};

inline std::vector<int32_t> select_on_cpu(const Selection& selection,
                                          const std::vector<float>& scores) {
  std::vector<int32_t> ends(static_cast<size_t>(selection.keys()), -1);
  top_keys(selection.view(scores.data()), selection.keep, selection.q_len,
           selection.ends_view(ends.data()));
  return ends;
}

// `select(selection, scores)` returns ends.
template <typename Select>
void check_selection(const Selection& selection, Select select) {
  SCOPED_TRACE(selection.name);
  const std::vector<float> scores = selection.scores();
  const std::vector<int32_t> expected = select_on_cpu(selection, scores);
  const std::vector<int32_t> got = select(selection, scores);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(got[i], expected[i]) << "key " << i % static_cast<size_t>(selection.kv_len)
                                   << " of place " << i / static_cast<size_t>(selection.kv_len);
  }
}

}  // namespace anymask::cuda
