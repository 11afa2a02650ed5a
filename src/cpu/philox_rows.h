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

inline void kept_keys(uint32_t key0, uint32_t key1, uint32_t digits, uint32_t first_row,
                      uint32_t block, uint32_t (*words)[kGroupRows]) {
  VecU32 row{};
  for (int i = 0; i < kLanes32; ++i) row[i] = first_row + static_cast<uint32_t>(i);
  for (int i = 0; i < kGroupRows; i += kLanes32) {
    const auto kept =
        rules::kept_keys<RowWords>({key0, key1, digits}, row + static_cast<uint32_t>(i), block);
    store(words[0] + i, kept.word[0]);
    store(words[1] + i, kept.word[1]);
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
