// Dropout's pattern: one random bit for every pair of a query and a key, the same on every backend,
// tile size, instruction set and key order.
//
// Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011; the fewest rounds that pass BigCrush), then 2 more for every further 128 bits of the
// same row and keys, where a call of its own would be 7. Words of it are read across: each output
// has two bits of the numbers of 64 pairs, so 13 rounds decide 64 pairs for multiples of 1 / 256,
// and fewer where the threshold ends in zero bits (p = 0.5: 7).
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
  // What two of the three say, a number's bit, that its lower bits are kept, that the threshold's
  // bit is not set.
  static ANYMASK_RULE Word kept(Word bit, Word lower, uint32_t set) {
    return (bit & lower) | (~set & (bit | lower));
  }
};

template <class Words>
struct PhiloxBlock {
  typename Words::Word word[4];
};

// A counter on its way through the rounds, and the key of the next one.
template <class Words>
struct PhiloxState {
  PhiloxBlock<Words> block;
  uint32_t key0, key1;

  template <int kRounds>
  ANYMASK_RULE void advance() {
    constexpr uint32_t kFactor0 = 0xd2511f53u, kFactor1 = 0xcd9e8d57u;
    constexpr uint32_t kStep0 = 0x9e3779b9u, kStep1 = 0xbb67ae85u;
    auto& x = block.word;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < kRounds; ++round) {
      typename Words::Word high0, low0, high1, low1;
      Words::multiply(kFactor0, x[0], high0, low0);
      Words::multiply(kFactor1, x[2], high1, low1);
      x[0] = high1 ^ x[1] ^ key0;
      x[1] = low1;
      x[2] = high0 ^ x[3] ^ key1;
      x[3] = low0;
      key0 += kStep0;
      key1 += kStep1;
    }
  }
};

inline constexpr int kPhiloxRounds = 7;

// The counter's block of random bits.
template <class Words>
ANYMASK_RULE PhiloxBlock<Words> philox(const PhiloxBlock<Words>& counter, uint32_t key0,
                                       uint32_t key1) {
  PhiloxState<Words> state = {counter, key0, key1};
  state.template advance<kPhiloxRounds>();
  return state.block;
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
  uint32_t digits;  // digits_of the threshold
};

// The bits that a threshold takes of its pairs' numbers: two for each output of Philox, without its
// zeros at the end, 2 at least. The lowest comes first, at the top, and a 1 after the last.
ANYMASK_RULE uint32_t digits_of(uint32_t threshold) {
  int first = 0;
  while (first < 14 && (threshold >> first & 3u) == 0) first += 2;
  uint32_t digits = 0;
  for (int bit = first; bit < 16; ++bit) digits |= (threshold >> bit & 1u) << (31 + first - bit);
  return digits | 1u << (15 + first);
}

// seed and offset: as the caller's seed_offset[0] and [1]. digits: as digits_of gives them.
ANYMASK_RULE Dropout dropout_of(int64_t seed, int64_t offset, int batch, int head,
                                uint32_t digits) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  const PhiloxBlock<ScalarWords> counter = {
      {static_cast<uint32_t>(batch), static_cast<uint32_t>(head), low(offset), high(offset)}};
  const PhiloxBlock<ScalarWords> keys = philox(counter, low(seed), high(seed));
  return {keys.word[0], keys.word[1], digits};
}

inline constexpr int kDropoutKeys = 64;  // of a block: those with the same j / 64

// Where key j of a block has its bit. A quad's lane holds keys 8k + 2q and 8k + 2q + 1 of a row of
// scores on the GPU (q: the lane), so their bits lie side by side, in the order of its
// accumulators: four permutations of bytes then deal 128 keys out to the quad, where words of 32
// keys in order take 40 instructions.
ANYMASK_RULE constexpr int word_of_key(int j) { return j / 4 % 2; }
ANYMASK_RULE constexpr int bit_of_key(int j) { return j / 2 % 2 * 16 + j / 8 % 8 * 2 + j % 2; }
// The other way round.
ANYMASK_RULE constexpr int key_of_bit(int word, int bit) {
  return bit / 2 % 8 * 8 + word * 4 + bit / 16 * 2 + bit % 2;
}

template <class Words>
struct KeptKeys {
  typename Words::Word word[2];
};

// Bit bit_of_key(j) of word word_of_key(j): whether `row` keeps key j, for the 64 keys of a block
// (one for all rows, or a Word). Rows and keys are the caller's own, whatever the order in which a
// plan brings them.
//
// All 64 comparisons of a number with the threshold at once, from the lowest bit up: a number with
// a 1 where the threshold has a 0 is not below it, one with a 0 where it has a 1 is, else the lower
// bits decide; so "kept" becomes what two of the three say: the number has a 1, it was kept, the
// threshold has a 0.
//
// Outputs 2 rounds apart must look independent, too: tests/rules/philox_test.cpp compares how often
// each key is dropped, each two of a block, and each two of neighbouring rows and blocks with
// chance. With 1 round between outputs some pairs of bits are equal, and it fails.
template <class Words, class Block>
ANYMASK_RULE KeptKeys<Words> kept_keys(const Dropout& dropout, typename Words::Word row,
                                       Block block) {
  using Word = typename Words::Word;
  const Word zero = row ^ row;
  PhiloxState<Words> state = {{{row, zero + block, zero, zero}}, dropout.key0, dropout.key1};
  state.template advance<kPhiloxRounds>();
  KeptKeys<Words> kept = {{~zero, ~zero}};
  for (uint32_t digits = dropout.digits;;) {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int bit = 0; bit < 2; ++bit, digits <<= 1) {
      const auto set = static_cast<uint32_t>(static_cast<int32_t>(digits) >> 31);
      for (int word = 0; word < 2; ++word) {
        Word& k = kept.word[word];
        k = Words::kept(state.block.word[2 * word + bit], k, set);
      }
    }
    if (digits == 0x80000000u) break;
    state.template advance<2>();
  }
  return kept;
}

}  // namespace anymask::rules
