// Dropout's pattern against published numbers and against its definition, pair by pair.
#include "rules/philox.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <vector>

namespace anymask::rules {
namespace {

using Block = PhiloxBlock<ScalarWords>;

std::array<uint32_t, 4> words_of(const Block& block) {
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

// Random123's known answers for philox4x32-7.
TEST(Philox, KnownAnswers) {
  const uint32_t ones = 0xffffffffu;
  EXPECT_EQ(words_of(philox(Block{{0, 0, 0, 0}}, 0, 0)),
            (std::array<uint32_t, 4>{0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u}));
  EXPECT_EQ(words_of(philox(Block{{ones, ones, ones, ones}}, ones, ones)),
            (std::array<uint32_t, 4>{0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u}));
  EXPECT_EQ(words_of(philox(Block{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
                            0xa4093822u, 0x299f31d0u)),
            (std::array<uint32_t, 4>{0x4dfccabau, 0x190a87f0u, 0xc47362bau, 0xb6b5242au}));
}

// What a pair's number takes of the threshold: its digits in base 4 up to the last that is not 0.
int outputs_of(uint32_t threshold) {
  for (int outputs = 8; outputs > 0; --outputs) {
    if (threshold >> (16 - 2 * outputs) & 3u) return outputs;
  }
  return 0;
}

// Output t: Philox of 7 + 2t rounds, written out once more.
std::array<uint32_t, 4> output(const Dropout& dropout, uint32_t row, uint32_t block, int t) {
  std::array<uint32_t, 4> x = {row, block, 0, 0};
  for (uint32_t round = 0; round < 7 + 2 * static_cast<uint32_t>(t); ++round) {
    const uint64_t one = uint64_t{0xd2511f53u} * x[0], two = uint64_t{0xcd9e8d57u} * x[2];
    x = {static_cast<uint32_t>(two >> 32) ^ x[1] ^ (dropout.key0 + round * 0x9e3779b9u),
         static_cast<uint32_t>(two),
         static_cast<uint32_t>(one >> 32) ^ x[3] ^ (dropout.key1 + round * 0xbb67ae85u),
         static_cast<uint32_t>(one)};
  }
  return x;
}

// A pair is dropped where its number, two bits of each output from the lowest up, is below the
// threshold's digits.
bool drops(const Dropout& dropout, uint32_t threshold, uint32_t row, uint32_t key) {
  const int outputs = outputs_of(threshold);
  const uint32_t first = key & 4u ? 2 : 0;
  const uint32_t bit = key % 2 + 2 * (key / 8 % 8) + 16 * (key / 2 % 2);
  uint32_t number = 0;
  for (int t = 0; t < outputs; ++t) {
    const std::array<uint32_t, 4> words = output(dropout, row, key / 64, t);
    for (uint32_t i = 0; i < 2; ++i) number |= (words[first + i] >> bit & 1u) << (2 * t + i);
  }
  return number < threshold >> (16 - 2 * outputs);
}

TEST(Dropout, DropsPairsWhoseNumberIsBelowTheThreshold) {
  for (const double p :
       {0.1, 0.5, 0.25, 0.9, 0.01, 0.99, 0.3125, 1.0 / 65536, 65535.0 / 65536, 0.999999, 0.0}) {
    const uint32_t threshold = dropout_threshold(p);
    const Dropout dropout = dropout_of(-7, int64_t{5} << 33, 3, 11, digits_of(threshold));
    for (uint32_t row = 0; row < 40; ++row) {
      for (uint32_t block = 0; block < 3; ++block) {
        const auto kept = kept_keys<ScalarWords>(dropout, row, block);
        for (int j = 0; j < kDropoutKeys; ++j) {
          const uint32_t key = 64 * block + static_cast<uint32_t>(j);
          ASSERT_EQ((kept.word[word_of_key(j)] >> bit_of_key(j) & 1u) == 0,
                    drops(dropout, threshold, row, key))
              << "p " << p << " row " << row << " key " << key;
        }
      }
    }
  }
}

TEST(Dropout, KeysAndBitsOfABlockCorrespond) {
  for (int j = 0; j < kDropoutKeys; ++j) EXPECT_EQ(key_of_bit(word_of_key(j), bit_of_key(j)), j);
}

// Keys of a block share one state of Philox. If its outputs hung together, so would they: how often
// each key is dropped, each two of a block, and each two of neighbouring rows and blocks, within
// as many standard deviations as chance exceeds once in 400 patterns.
TEST(Dropout, PairsLookIndependent) {
  constexpr uint32_t kRows = 512, kBlocks = 65;
  for (const double p : {0.1, 0.5, 0.05}) {
    const uint32_t threshold = dropout_threshold(p);
    const double q = threshold / 65536.0;
    const Dropout dropout = dropout_of(11, 0, 0, 1, digits_of(threshold));
    std::vector<uint64_t> dropped;
    for (uint32_t row = 0; row < kRows; ++row) {
      for (uint32_t block = 0; block < kBlocks; ++block) {
        const auto kept = kept_keys<ScalarWords>(dropout, row, block);
        dropped.push_back(~(uint64_t{kept.word[0]} | uint64_t{kept.word[1]} << 32));
      }
    }
    const auto expect_independent = [&](size_t distance, const char* name) {
      const size_t count = dropped.size() - kBlocks;
      std::vector<double> one(64), two(64), both(64 * 64);
      for (size_t at = 0; at < count; ++at) {
        for (uint64_t left = dropped[at]; left != 0; left &= left - 1) {
          const auto i = static_cast<size_t>(std::countr_zero(left));
          ++one[i];
          for (uint64_t other = dropped[at + distance]; other != 0; other &= other - 1) {
            ++both[64 * i + static_cast<size_t>(std::countr_zero(other))];
          }
        }
        for (size_t j = 0; j < 64; ++j)
          two[j] += static_cast<double>(dropped[at + distance] >> j & 1u);
      }
      const auto n = static_cast<double>(count);
      for (size_t i = 0; i < 64; ++i) {
        EXPECT_LT(std::abs(one[i] - n * q) / std::sqrt(n * q * (1 - q)), 5) << name << p << i;
        for (size_t j = 0; j < 64; ++j) {
          if (distance == 0 && i == j) continue;
          const double excess = both[64 * i + j] - q * one[i] - q * two[j] + n * q * q;
          EXPECT_LT(std::abs(excess) / (std::sqrt(n) * q * (1 - q)), 5.5)
              << name << " p " << p << ", bits " << i << " and " << j;
        }
      }
    };
    expect_independent(0, "one block");
    expect_independent(1, "neighbouring blocks");
    expect_independent(kBlocks, "neighbouring rows");
  }
}

TEST(Dropout, ThresholdsAreTheNearestAndNeverEverything) {
  EXPECT_EQ(dropout_threshold(0), 0u);
  EXPECT_EQ(dropout_threshold(0.1), 26u * 256);
  EXPECT_EQ(dropout_threshold(1.0 / 64), 1024u);
  EXPECT_EQ(dropout_threshold(0.01), 655u);
  EXPECT_EQ(dropout_threshold(0.99), 64881u);
  EXPECT_EQ(dropout_threshold(0.5), 32768u);
  EXPECT_EQ(dropout_threshold(0.9999999), 65535u);
  EXPECT_DOUBLE_EQ(dropout_scale(32768), 2.0);
  EXPECT_DOUBLE_EQ(dropout_scale(0), 1.0);
}

// Another seed, offset (either half of it), batch entry or head is another pattern.
TEST(Dropout, EveryPartOfTheKeyCounts) {
  const auto first = [](const Dropout& d) { return std::pair{d.key0, d.key1}; };
  const auto base = first(dropout_of(1, 2, 3, 4, 9));
  EXPECT_NE(first(dropout_of(2, 2, 3, 4, 9)), base);
  EXPECT_NE(first(dropout_of(1 + (int64_t{1} << 40), 2, 3, 4, 9)), base);
  EXPECT_NE(first(dropout_of(1, 3, 3, 4, 9)), base);
  EXPECT_NE(first(dropout_of(1, 2 + (int64_t{1} << 40), 3, 4, 9)), base);
  EXPECT_NE(first(dropout_of(1, 2, 4, 4, 9)), base);
  EXPECT_NE(first(dropout_of(1, 2, 3, 5, 9)), base);
}

}  // namespace
}  // namespace anymask::rules
