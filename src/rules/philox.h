// Dropout's pattern: one random bit for every pair of a query and a key, the same on every backend,
// tile size, instruction set and key order.
//
// Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011; the fewest rounds that pass BigCrush). Words of it are read across: bit j % 32 of up
// to 16 words is one 16-bit number for the pair (row, key j), so 4 calls decide 32 pairs, and
// fewer where the threshold ends in zero bits (p = 0.5: one).
#pragma once

#include "rules/common.h"

namespace anymask::rules {

// What Philox counts with: a word here; kernels bring several of them at once.
struct ScalarWords {
  using Word = uint32_t;
  static ANYMASK_RULE void multiply(uint32_t a, Word b, Word& high, Word& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

template <class Words>
struct PhiloxBlock {
  typename Words::Word word[4];
};

// The counter's block of random bits.
template <class Words>
ANYMASK_RULE PhiloxBlock<Words> philox(const PhiloxBlock<Words>& counter, uint32_t key0,
                                       uint32_t key1) {
  constexpr uint32_t kFactor0 = 0xd2511f53u, kFactor1 = 0xcd9e8d57u;
  constexpr uint32_t kStep0 = 0x9e3779b9u, kStep1 = 0xbb67ae85u;
  constexpr int kRounds = 7;
  auto x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    typename Words::Word high0, low0, high1, low1;
    Words::multiply(kFactor0, x0, high0, low0);
    Words::multiply(kFactor1, x2, high1, low1);
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += kStep0;
    key1 += kStep1;
  }
  return {{x0, x1, x2, x3}};
}

// ---- dropout ------------------------------------------------------------------------------------

// A pair is dropped with the probability threshold / 65536. Unless that would be far from what was
// asked for, it is a multiple of 1 / 256: half of the random bits are needed then.
inline constexpr uint32_t kDropoutRange = 65536;

// The threshold of p, 0 <= p < 1, to the nearest; never everything.
ANYMASK_RULE uint32_t dropout_threshold(double p) {
  constexpr double kFine = 1.0 / 64;
  if (p >= kFine && p <= 1 - kFine) return static_cast<uint32_t>(p * 256 + 0.5) * 256;
  const auto nearest = static_cast<uint32_t>(p * kDropoutRange + 0.5);
  return nearest < kDropoutRange ? nearest : kDropoutRange - 1;
}

// What kept weights are multiplied with, so that the mean stays: exact in the threshold, not in p.
ANYMASK_RULE double dropout_scale(uint32_t threshold) {
  return static_cast<double>(kDropoutRange) / (kDropoutRange - threshold);
}

// The pattern of one batch entry and query head.
struct Dropout {
  uint32_t key0, key1;
  uint32_t threshold;  // 0: nothing is dropped
};

// seed and offset: as the caller's seed_offset[0] and [1].
ANYMASK_RULE Dropout dropout_of(int64_t seed, int64_t offset, int batch, int head,
                                uint32_t threshold) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  const PhiloxBlock<ScalarWords> counter = {
      {static_cast<uint32_t>(batch), static_cast<uint32_t>(head), low(offset), high(offset)}};
  const PhiloxBlock<ScalarWords> keys = philox(counter, low(seed), high(seed));
  return {keys.word[0], keys.word[1], threshold};
}

// Blocks of Philox that `threshold` takes: word k stands for its bit 15 - k, and zero bits below
// the lowest set one decide nothing.
ANYMASK_RULE int dropout_blocks(uint32_t threshold) {
  return (threshold & 0xfu) != 0     ? 4
         : (threshold & 0xffu) != 0  ? 3
         : (threshold & 0xfffu) != 0 ? 2
                                     : 1;
}

// Bit j % 32: whether `row` drops key j, for the 32 keys with j / 32 == column_block (one for all
// rows, or a Word). Rows and keys are the caller's own, whatever the order in which a plan brings
// them.
//
// All 32 comparisons of a 16-bit number with the threshold at once, from the lowest bit up: where
// the threshold has a 1, a number with a 0 is below it, and one with a 1 is if its lower bits are;
// so "below" becomes what two of the three say: the number has a 0, it was below, the bit is set.
template <class Words, class ColumnBlock>
ANYMASK_RULE typename Words::Word dropped_keys(const Dropout& dropout, typename Words::Word row,
                                               ColumnBlock column_block) {
  using Word = typename Words::Word;
  const Word zero = row ^ row;
  Word below = zero;
  for (int block = dropout_blocks(dropout.threshold) - 1; block >= 0; --block) {
    const PhiloxBlock<Words> counter = {
        {row, zero + column_block, zero + static_cast<uint32_t>(block), zero}};
    const PhiloxBlock<Words> random = philox(counter, dropout.key0, dropout.key1);
    const uint32_t bits = dropout.threshold >> (12 - 4 * block);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 3; k >= 0; --k) {
      const uint32_t set = 0u - ((bits >> (3 - k)) & 1u);
      below = (~random.word[k] & (below | set)) | (below & set);
    }
  }
  return below;
}

}  // namespace anymask::rules
