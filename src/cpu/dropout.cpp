#include "cpu/dropout.h"

#include <algorithm>
#include <numeric>

#include "cpu/words.h"

namespace anymask::cpu {

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
    const auto fill = [&](uint32_t block, uint32_t* to) {
      kernels().kept_words(dropout.key0, dropout.key1, dropout.digits, first_row, block, to);
    };
    for (int i = 0; i < keys.count;) {
      const uint32_t block = block_of(i);
      const bool starts = !keys.reordered() && keys.key(i) % rules::kDropoutKeys == 0;
      if (starts && keys.count - i >= rules::kDropoutKeys) {
        fill(block, words + i);
        i += rules::kDropoutKeys;
        continue;
      }
      uint32_t kept[rules::kDropoutKeys];
      fill(block, kept);
      for (; i < keys.count && block_of(i) == block; ++i) {
        words[at[i]] = kept[keys.key(at[i]) % rules::kDropoutKeys];
      }
    }
  }
}

}  // namespace anymask::cpu
