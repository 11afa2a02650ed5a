#include "cpu/dropout.h"

#include <algorithm>
#include <numeric>

#include "cpu/words.h"

namespace anymask::cpu {
namespace {

// bits[i] bit j becomes bits[j] bit i: halves of 16, 8, ... 1 rows change places.
void transpose(uint32_t (&bits)[32]) {
  uint32_t low = 0x0000ffffu;
  for (int half = 16; half > 0; half /= 2, low ^= low << half) {
    for (int i = 0; i < 32; i = ((i | half) + 1) & ~half) {
      const uint32_t crossing = ((bits[i] >> half) ^ bits[i | half]) & low;
      bits[i] ^= crossing << half;
      bits[i | half] ^= crossing;
    }
  }
}

}  // namespace

void kept_words(const rules::Dropout& dropout, const TileKeys& keys, int64_t row, int rows,
                uint32_t* words) {
  // Positions by key: neighbours then mostly lie in one block of 64 keys, whatever the order.
  int at[kMaxTileKeys];
  std::iota(at, at + keys.count, 0);
  if (keys.reordered()) {
    std::sort(at, at + keys.count, [&](int a, int b) { return keys.key(a) < keys.key(b); });
  }
  const auto block_of = [&](int i) {
    return static_cast<uint32_t>(keys.key(at[i]) / rules::kDropoutKeys);
  };
  for (int group = 0; group * kGroupRows < rows; ++group, words += kWordsStride) {
    const auto first_row = static_cast<uint32_t>(row + group * kGroupRows);
    for (int i = 0; i < keys.count;) {
      const uint32_t block = block_of(i);
      uint32_t kept[2][kGroupRows];
      kernels().kept_keys(dropout.key0, dropout.key1, dropout.digits, first_row, block, kept);
      transpose(kept[0]);
      transpose(kept[1]);
      for (; i < keys.count && block_of(i) == block; ++i) {
        const auto key = static_cast<int>(keys.key(at[i]) % rules::kDropoutKeys);
        words[at[i]] = kept[rules::word_of_key(key)][rules::bit_of_key(key)];
      }
    }
  }
}

}  // namespace anymask::cpu
