// The pairs that dropout keeps, in the words of mask bits (mask_bits.h): made by the same warps,
// for every tile.
//
// Dropout's pattern comes as 32 keys of a row, so here a lane is a row, and what it makes needs no
// transposition: only the bits of 128 keys have to be dealt out to the four lanes of a quad.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/schedule.h"

namespace anymask::cuda {

// Which of kWords times 32 positions of a tile of kColumns `row` drops; see dropped_in_order.
template <int kColumns, int kWords>
__device__ __forceinline__ void dropped_words(const rules::Dropout& dropout, int row,
                                              const int32_t* order, int first, int kv_len,
                                              uint32_t (&words)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = 0;
  if (order != nullptr) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = dropped_in_order(dropout, row, order, first + 32 * w, kv_len);
    }
    return;
  }
#pragma unroll
  for (int w = 0; w + 1 < kWords; w += 2) {
    const uint32_t row_word = row, block = first / 32 + w;
    const WordPair pair = rules::dropped_keys<PairedWords>(dropout, WordPair{row_word, row_word},
                                                           WordPair{block, block + 1});
    words[w] = pair.a;
    words[w + 1] = pair.b;
  }
  if constexpr (kWords % 2 != 0) {
    constexpr int kLast = kWords - 1;
    words[kLast] = rules::dropped_keys<rules::ScalarWords>(dropout, row, first / 32 + kLast);
  }
  if constexpr (kColumns % 32 != 0) {  // a tile may begin in the middle of a word
    const int shift = first % 32;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = __funnelshift_r(words[w], w < 3 ? words[w + 1] : 0u, shift);
    }
  }
}

// Words of 32 columns of a row become words of 32 accumulators: word q has the columns 8k + 2q and
// 8k + 2q + 1 of all 128, in order. A bit's place in its word, (k % 4, q, low), becomes
// (q, k % 4, low) by two exchanges; then bytes change words.
__device__ __forceinline__ void deal_columns(uint32_t (&words)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t crossing = ((words[w] >> 12) ^ words[w]) & 0x0000f0f0u;
    words[w] ^= crossing ^ (crossing << 12);
    crossing = ((words[w] >> 6) ^ words[w]) & 0x00cc00ccu;
    words[w] ^= crossing ^ (crossing << 6);
  }
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
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
    constexpr int kLast = C.columns - 128 * (C.word_groups() - 1);
    // Turns the other way round in the second group, so that every warp has as much to do.
    int run = group == 0 ? index : kBitWarps - 1 - index;
#pragma unroll 1
    for (; run < kRuns; run += kBitWarps) {
      const int row = 32 * run + lane;
      if (first_row + 32 * run >= p.q_len) break;
      uint32_t words[4];
      const int position = first + 128 * group;
      if (group + 1 < C.word_groups()) {
        dropped_words<C.columns, 4>(dropout, first_row + row, order, position, p.kv_len, words);
      } else {
        dropped_words<C.columns, (kLast + 31) / 32>(dropout, first_row + row, order, position,
                                                    p.kv_len, words);
      }
      deal_columns(words);
      uint4* to = reinterpret_cast<uint4*>(slot[run / 2][group][row % 64]);
      *to = {~words[0], ~words[1], ~words[2], ~words[3]};
    }
  }
}

}  // namespace anymask::cuda
