// Dropout's pattern against published numbers and against its definition, pair by pair.
#include "rules/philox.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

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

// The 16-bit number of a pair, bit by bit.
uint32_t number_of(const Dropout& dropout, uint32_t row, uint32_t key) {
  uint32_t number = 0;
  for (uint32_t k = 0; k < 16; ++k) {
    const Block random = philox(Block{{row, key / 32, k / 4, 0}}, dropout.key0, dropout.key1);
    number = number * 2 + (random.word[k % 4] >> (key % 32) & 1u);
  }
  return number;
}

TEST(Dropout, DropsPairsWhoseNumberIsBelowTheThreshold) {
  for (const double p :
       {0.1, 0.5, 0.25, 0.9, 0.01, 0.99, 1.0 / 65536, 65535.0 / 65536, 0.999999, 0.0}) {
    const uint32_t threshold = dropout_threshold(p);
    const Dropout dropout = dropout_of(-7, int64_t{5} << 33, 3, 11, threshold);
    for (uint32_t row = 0; row < 40; ++row) {
      for (uint32_t block = 0; block < 3; ++block) {
        const uint32_t dropped = dropped_keys<ScalarWords>(dropout, row, block);
        for (uint32_t j = 0; j < 32; ++j) {
          ASSERT_EQ((dropped >> j & 1u) != 0, number_of(dropout, row, 32 * block + j) < threshold)
              << "p " << p << " row " << row << " key " << 32 * block + j;
        }
      }
    }
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
