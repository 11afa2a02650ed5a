// The caller's element types: loading them as float or double vectors and rounding back.
#pragma once

#include "cpu/simd.h"

namespace anymask::cpu::ANYMASK_ISA {

// One instruction, where GCC makes three of __builtin_convertvector.
ANYMASK_INLINE VecU32 widen_words(VecU16 x) {
#if defined(__AVX512F__)
  return bit_cast<VecU32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return bit_cast<VecU32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, VecU32);
#endif
}

// bf16 is the upper half of a float.
ANYMASK_INLINE VecF float_from_bf16(VecU16 x) { return bit_cast<VecF>(widen_words(x) << 16); }
ANYMASK_INLINE VecU16 bf16_from_float(VecF x) {
  const VecU32 u = bit_cast<VecU32>(x);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU32 quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, VecU16);
}

#if defined(__AVX512F__)
ANYMASK_INLINE VecF float_from_f16(VecU16 x) { return _mm512_cvtph_ps(bit_cast<__m256i>(x)); }
ANYMASK_INLINE VecU16 f16_from_float(VecF x) {
  return bit_cast<VecU16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
ANYMASK_INLINE VecF float_from_f16(VecU16 x) { return _mm256_cvtph_ps(bit_cast<__m128i>(x)); }
ANYMASK_INLINE VecU16 f16_from_float(VecF x) {
  return bit_cast<VecU16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Moving exponent and mantissa into place leaves the exponent 112 too small, which one exact
// multiplication repairs, denormals included; infinities and NaN get the largest exponent.
ANYMASK_INLINE VecF float_from_f16(VecU16 x) {
  const VecU32 u = __builtin_convertvector(x, VecU32);
  const VecU32 sign = (u & 0x8000u) << 16;
  const VecU32 body = (u & 0x7fffu) << 13;
  const VecF scaled = bit_cast<VecF>(body) * 0x1p112f;
  const VecU32 magnitude =
      (u & 0x7fffu) >= 0x7c00u ? (body | 0x7f800000u) : bit_cast<VecU32>(scaled);
  return bit_cast<VecF>(magnitude | sign);
}
ANYMASK_INLINE VecU16 f16_from_float(VecF x) {
  const VecU32 u = bit_cast<VecU32>(x);
  const VecU32 sign = (u >> 16) & 0x8000u;
  const VecU32 body = u & 0x7fffffffu;
  // Normal results: rebias and round to nearest even in the integer domain.
  const VecU32 normal = (body - (112u << 23) + 0xfffu + ((body >> 13) & 1u)) >> 13;
  // Denormal results: adding 0.5 puts the rounded mantissa into the lowest bits.
  const VecU32 tiny = bit_cast<VecU32>(bit_cast<VecF>(body) + 0.5f) - 0x3f000000u;
  VecU32 result = body < (113u << 23) ? tiny : normal;
  result = body >= 0x477ff000u ? VecU32{} + 0x7c00u : result;
  result = body > 0x7f800000u ? VecU32{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, VecU16);
}
#endif

// Element types: `Raw` is what memory holds, `Vec` what arithmetic sees.
struct InF32 {
  using Raw = float;
  using Vec = VecF;
  using RawVec = VecF;
  static ANYMASK_INLINE VecF widen(VecF x) { return x; }
  static ANYMASK_INLINE VecF narrow(VecF x) { return x; }
};
struct InF64 {
  using Raw = double;
  using Vec = VecD;
  using RawVec = VecD;
  static ANYMASK_INLINE VecD widen(VecD x) { return x; }
  static ANYMASK_INLINE VecD narrow(VecD x) { return x; }
};
struct InF16 {
  using Raw = uint16_t;
  using Vec = VecF;
  using RawVec = VecU16;
  static ANYMASK_INLINE VecF widen(VecU16 x) { return float_from_f16(x); }
  static ANYMASK_INLINE VecU16 narrow(VecF x) { return f16_from_float(x); }
};
struct InBf16 {
  using Raw = uint16_t;
  using Vec = VecF;
  using RawVec = VecU16;
  static ANYMASK_INLINE VecF widen(VecU16 x) { return float_from_bf16(x); }
  static ANYMASK_INLINE VecU16 narrow(VecF x) { return bf16_from_float(x); }
};

// Loads `count` elements, at most a vector of them.
template <class In>
ANYMASK_INLINE typename In::Vec load_as(const typename In::Raw* from, int count) {
  using Raw = typename In::RawVec;
  constexpr int kLanes = Lanes<typename In::Vec>::kCount;
  return In::widen(count >= kLanes ? load<Raw>(from) : load_first<Raw>(from, count));
}
template <class In>
ANYMASK_INLINE void store_as(typename In::Raw* to, typename In::Vec v, int count) {
  constexpr int kLanes = Lanes<typename In::Vec>::kCount;
  const auto raw = In::narrow(v);
  if (count >= kLanes) {
    store(to, raw);
  } else {
    store_first(to, raw, count);
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
