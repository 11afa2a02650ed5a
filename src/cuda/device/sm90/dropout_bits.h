// The pairs that dropout keeps, in the words of mask bits (mask_bits.h): made by the same warps,
// for every tile.
//
// Dropout's pattern comes as 64 keys of a row, in the order of a quad's accumulators. So here a
// lane is a row, and what it makes needs no transposition.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/schedule.h"

namespace anymask::cuda {

// The bits of two blocks of 64 keys as words of the four lanes of a quad: word q has the columns
// 8k + 2q and 8k + 2q + 1 of all 128, in order.
__device__ __forceinline__ uint4 words_of_quad(uint32_t first0, uint32_t first1, uint32_t next0,
                                               uint32_t next1) {
  return {__byte_perm(first0, next0, 0x5410), __byte_perm(first0, next0, 0x7632),
          __byte_perm(first1, next1, 0x5410), __byte_perm(first1, next1, 0x7632)};
}

// The same of the keys at `count` positions from `first` on, in their order.
__device__ __forceinline__ uint4 words_in_order(const rules::Dropout& dropout, int row,
                                                const int32_t* order, int first, int count) {
  uint32_t words[4] = {};
  KeptInOrder kept;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const uint32_t bit = kept.bit(dropout, row, order[first + i]) << (i / 8 * 2 + i % 2);
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] |= i / 2 % 4 == q ? bit : 0;
  }
  return {words[0], words[1], words[2], words[3]};
}

// The words of up to 128 positions of a tile that are not reordered.
template <int kColumns>
__device__ __forceinline__ uint4 kept_words(const rules::Dropout& dropout, int row, int first) {
  // A tile may begin in the middle of a block, but two hold all of it.
  constexpr int kTile = kColumns < 128 ? kColumns : 128;
  constexpr int kStep = kColumns % 64 == 0 ? 64 : kColumns % 32 == 0 ? 32 : 16;
  static_assert(kColumns % 16 == 0 && 64 - kStep + kTile <= 128);
  const uint32_t row_word = row, block = first / rules::kDropoutKeys;
  const rules::KeptKeys<PairedWords> kept = rules::kept_keys<PairedWords>(
      dropout, WordPair{row_word, row_word}, WordPair{block, block + 1});
  uint4 words = words_of_quad(kept.word[0].a, kept.word[1].a, kept.word[0].b, kept.word[1].b);
  if constexpr (kStep != 64) {
    const int shift = first % rules::kDropoutKeys / 4;
    words = {words.x >> shift, words.y >> shift, words.z >> shift, words.w >> shift};
  }
  return words;
}

// This warp's share of a tile's words, stored to `slot`. first_row: the item's; first: the tile's
// first position.
template <ForwardConfig C>
__device__ __forceinline__ void make_kept(const ForwardParams& p, const rules::Dropout& dropout,
                                          const int32_t* order, int first_row, int first, int index,
                                          int lane,
                                          uint32_t (&slot)[C.warpgroups][C.word_groups()][64][4]) {
  constexpr int kRuns = C.rows() / 32;  // of rows
#pragma unroll
  for (int group = 0; group < C.word_groups(); ++group) {
    const int position = first + 128 * group;
    const int columns = rules::min_of(128, C.columns - 128 * group);
    const auto store = [&](uint32_t run, uint4 words) {
      *reinterpret_cast<uint4*>(slot[run / 2][group][32 * (run % 2) + lane]) = words;
    };
    // Turns the other way round in the second group, so that every warp has as much to do.
    int run = group == 0 ? index : kBitWarps - 1 - index;
    // One block of keys: a second run of rows is what else there is to do while waiting.
    if (columns == 64 && kRuns == 2 * kBitWarps && order == nullptr) {
      if (first_row + 32 * run >= p.q_len) continue;
      uint32_t row = first_row + 32 * run + lane;
      // Not the same for all tiles, as far as the compiler may know: it would keep what the first
      // rounds make of it in local memory.
      asm volatile("" : "+r"(row));
      const rules::KeptKeys<PairedWords> kept = rules::kept_keys<PairedWords>(
          dropout, WordPair{row, row + 32 * kBitWarps}, position / rules::kDropoutKeys);
      store(run, words_of_quad(kept.word[0].a, kept.word[1].a, 0, 0));
      store(run + kBitWarps, words_of_quad(kept.word[0].b, kept.word[1].b, 0, 0));
      continue;
    }
#pragma unroll 1
    for (; run < kRuns; run += kBitWarps) {
      const int row = first_row + 32 * run + lane;
      if (first_row + 32 * run >= p.q_len) break;
      store(run, order == nullptr ? kept_words<C.columns>(dropout, row, position)
                                  : words_in_order(dropout, row, order, position,
                                                   rules::min_of(columns, p.kv_len - position)));
    }
  }
}

}  // namespace anymask::cuda
