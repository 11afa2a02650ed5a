// Dropout's pattern for the rows of a group at once, a row a lane.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "rules/philox.h"

namespace anymask::cpu::ANYMASK_ISA {

struct RowWords {
  using Word = VecU32;
  // Products of the even lanes, then of the odd ones.
  static ANYMASK_INLINE void multiply(uint32_t a, Word b, Word& high, Word& low) {
    const VecU64 even = products(splat<VecU32>(a), b);
    const VecU64 odd = products(splat<VecU32>(a), bit_cast<VecU32>(bit_cast<VecU64>(b) >> 32));
    high = bit_cast<VecU32>((even >> 32) | (odd & 0xffffffff00000000ull));
    low = b * a;
  }
  static ANYMASK_INLINE Word kept(Word bit, Word lower, uint32_t set) {
    return (bit & lower) | (~set & (bit | lower));
  }
  static ANYMASK_INLINE VecU64 products(VecU32 a, VecU32 b) {
#if defined(__AVX512F__)
    return bit_cast<VecU64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return bit_cast<VecU64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    return bit_cast<VecU64>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#endif
  }
};

// The place i in memory that has a row of a group: so that bytes of 32 rows come to lie in order
// when transpose_rows brings four vectors together.
constexpr uint32_t row_of_place(uint32_t i) { return i / 4 % 2 * 16 + i / 8 * 4 + i % 4; }

// Bit b of rows[i] becomes bit row_of_place(i) of words[rules::key_of_bit(word, b)].
ANYMASK_INLINE void transpose_rows(const uint32_t* rows, int word, uint32_t* words) {
#if defined(__AVX2__)
  // Bytes of the same 8 keys first, then a row's bit a byte is what vpmovmskb takes: 110
  // instructions, where exchanging bits of halves takes 480.
  const __m256i bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm256_shuffle_epi8(load<__m256i>(rows + 8 * i), bytes);
  const __m256i low[2] = {_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpacklo_epi32(v[2], v[3])};
  const __m256i high[2] = {_mm256_unpackhi_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[2], v[3])};
  v[0] = _mm256_unpacklo_epi64(low[0], low[1]);
  v[1] = _mm256_unpackhi_epi64(low[0], low[1]);
  v[2] = _mm256_unpacklo_epi64(high[0], high[1]);
  v[3] = _mm256_unpackhi_epi64(high[0], high[1]);
  ANYMASK_UNROLL
  for (int b = 31; b >= 0; --b) {
    __m256i& byte = v[b / 8];
    words[rules::key_of_bit(word, b)] = static_cast<uint32_t>(_mm256_movemask_epi8(byte));
    byte = _mm256_add_epi8(byte, byte);
  }
#else
  uint32_t bits[32];
  for (uint32_t i = 0; i < 32; ++i) bits[row_of_place(i)] = rows[i];
  // Halves of 16, 8, ... 1 rows change places.
  uint32_t low = 0x0000ffffu;
  for (int half = 16; half > 0; half /= 2, low ^= low << half) {
    for (int i = 0; i < 32; i = ((i | half) + 1) & ~half) {
      const uint32_t crossing = ((bits[i] >> half) ^ bits[i | half]) & low;
      bits[i] ^= crossing << half;
      bits[i | half] ^= crossing;
    }
  }
  for (int b = 0; b < 32; ++b) words[rules::key_of_bit(word, b)] = bits[b];
#endif
}

inline void kept_words(uint32_t key0, uint32_t key1, uint32_t digits, uint32_t first_row,
                       uint32_t block, uint32_t* words) {
  uint32_t rows[2][kGroupRows];
  for (uint32_t i = 0; i < kGroupRows; i += kLanes32) {
    VecU32 row{};
    for (uint32_t n = 0; n < kLanes32; ++n) row[n] = first_row + row_of_place(i + n);
    const auto kept = rules::kept_keys<RowWords>({key0, key1, digits}, row, block);
    store(rows[0] + i, kept.word[0]);
    store(rows[1] + i, kept.word[1]);
  }
  transpose_rows(rows[0], 0, words);
  transpose_rows(rows[1], 1, words);
}

}  // namespace anymask::cpu::ANYMASK_ISA
