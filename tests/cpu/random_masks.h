// Masks of every kind and expressions of them, of two heads, for tests that compare two ways of
// looking at a mask.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"

namespace anymask {

// Random expressions over random arrays, which live as long as this does.
class RandomMasks {
 public:
  explicit RandomMasks(unsigned seed) : engine_(seed) {}
  int between(int first, int last) {
    return std::uniform_int_distribution<int>(first, last)(engine_);
  }
  Tensor numbers(std::initializer_list<int64_t> shape, int first, int last, bool sorted) {
    const int64_t count =
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies());
    std::vector<int32_t>& all = memory_.emplace_back(static_cast<size_t>(count));
    for (int32_t& one : all) one = between(first, last);
    if (sorted) std::sort(all.begin(), all.end());
    return Tensor(all.data(), DType::i32, shape);
  }

  Mask leaf(int q_len, int kv_len) {
    const bool sorted = between(0, 1) == 0;
    switch (between(0, 7)) {
      case 0:
        return sliding_window(between(-1, 60), between(-1, 60));
      case 1:
        return prefix_lm(between(0, kv_len));
      case 2: {
        const bool causal = between(0, 1) == 0;
        const int n = (causal ? 1 : 2) * between(1, 2);
        return intervals(numbers({1, 2, kv_len, n}, -5, q_len + 5, sorted), causal);
      }
      case 3: {
        // Short runs far apart, and empty ones.
        const Tensor runs = numbers({1, 1, kv_len, 4}, 0, 2, sorted);
        auto* row = static_cast<int32_t*>(runs.data);
        for (int j = 0; j < kv_len; ++j, row += 4) {
          row[0] *= q_len / 3;
          row[2] *= q_len / 2;
          row[1] = row[0] + row[1] * 3 - 2;
          row[3] = row[2] + row[3] * 3 - 2;
        }
        return intervals(runs, false);
      }
      case 4:
        return documents(numbers({1, q_len}, 0, 3, sorted), numbers({1, kv_len}, 0, 3, sorted));
      case 5:
        return ids(numbers({1, 2, q_len}, -200, 0, sorted),
                   numbers({1, 2, kv_len}, -200, 0, sorted));
      case 6:
        return blocks(numbers({(q_len + 31) / 32, (kv_len + 47) / 48}, 0, 1, false), 32, 48);
      default:
        return dense(numbers({1, 1, q_len, kv_len}, between(-6, 0), 1, false));
    }
  }

  Mask tree(int leaves, int q_len, int kv_len) {
    if (leaves == 1) {
      const Mask mask = leaf(q_len, kv_len);
      return between(0, 3) == 0 ? ~mask : mask;
    }
    const int left = between(1, leaves - 1);
    const Mask a = tree(left, q_len, kv_len), b = tree(leaves - left, q_len, kv_len);
    return between(0, 1) == 0 ? a & b : a | b;
  }

 private:
  std::mt19937 engine_;
  std::vector<std::vector<int32_t>> memory_;
};

}  // namespace anymask
