// The SIMD layer: GCC/Clang vector extensions and the few instructions that they do not reach.
//
// Included only by the isa_*.cpp files, which set ANYMASK_ISA (a namespace of their own, so that no
// two instruction sets share a symbol) and ANYMASK_VECTOR_BYTES.
#pragma once

#include <cstddef>
#include <cstdint>

// GCC 12 warns about its own headers' undefined operands.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#define ANYMASK_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define ANYMASK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ANYMASK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace anymask::cpu::ANYMASK_ISA {

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

inline constexpr int kBytes = ANYMASK_VECTOR_BYTES;
inline constexpr int kLanes32 = kBytes / 4;
inline constexpr int kLanes64 = kBytes / 8;

using VecF = Vector<float, kLanes32>;
using VecD = Vector<double, kLanes64>;
using VecU32 = Vector<uint32_t, kLanes32>;
using VecI32 = Vector<int32_t, kLanes32>;
using VecU64 = Vector<uint64_t, kLanes64>;
using VecU16 = Vector<uint16_t, kLanes32>;  // half a register: as many lanes as VecF

// Lanes, and the unsigned integers of the same width.
template <class V>
struct Lanes;
template <>
struct Lanes<VecF> {
  using T = float;
  using Bits = VecU32;
  static constexpr int kCount = kLanes32;
};
template <>
struct Lanes<VecU32> {
  using T = uint32_t;
  using Bits = VecU32;
  static constexpr int kCount = kLanes32;
};
template <>
struct Lanes<VecD> {
  using T = double;
  using Bits = VecU64;
  static constexpr int kCount = kLanes64;
};

template <class V>
ANYMASK_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
ANYMASK_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}
template <class T>
ANYMASK_INLINE T load_scalar(const void* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof(T));
  return x;
}
// The first `count` elements, zeros behind them.
template <class V>
ANYMASK_INLINE V load_first(const void* from, int count) {
  V v{};
  __builtin_memcpy(&v, from, static_cast<size_t>(count) * sizeof(v[0]));
  return v;
}
template <class V>
ANYMASK_INLINE void store_first(void* to, V v, int count) {
  __builtin_memcpy(to, &v, static_cast<size_t>(count) * sizeof(v[0]));
}

// x - 0 is x for every x, and compiles to a broadcast.
template <class V>
ANYMASK_INLINE V splat(typename Lanes<V>::T x) {
  return x - V{};
}
template <class To, class From>
ANYMASK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

ANYMASK_INLINE VecF maximum(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return _mm_max_ps(a, b);
#endif
}
ANYMASK_INLINE VecD maximum(VecD a, VecD b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  return _mm_max_pd(a, b);
#endif
}

template <class V>
ANYMASK_INLINE typename Lanes<V>::T sum_of_lanes(V x) {
  typename Lanes<V>::T sum{};
  for (int i = 0; i < Lanes<V>::kCount; ++i) sum += x[i];
  return sum;
}

// 1, 2, 4, ... : one bit per lane.
template <class V>
ANYMASK_INLINE typename Lanes<V>::Bits lane_bits() {
  typename Lanes<V>::Bits bits;
  for (int i = 0; i < Lanes<V>::kCount; ++i) bits[i] = 1u << i;
  return bits;
}

// Lane i: bit i of `word` ? a : b.
ANYMASK_INLINE VecF select_bits(uint32_t word, VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(word), a);
#else
  const VecU32 bits = lane_bits<VecF>();
  return (splat<VecU32>(word) & bits) != 0 ? a : b;
#endif
}
ANYMASK_INLINE VecD select_bits(uint32_t word, VecD a, VecD b) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_pd(b, static_cast<__mmask8>(word), a);
#else
  const VecU64 bits = lane_bits<VecD>();
  return ((word - VecU64{}) & bits) != 0 ? a : b;
#endif
}

// Lane i: bit `bit` of words[i] ? a : b.
ANYMASK_INLINE VecF select_words(const uint32_t* words, int bit, VecF a, VecF b) {
  return (load<VecU32>(words) & splat<VecU32>(1u << bit)) != 0 ? a : b;
}
ANYMASK_INLINE VecD select_words(const uint32_t* words, int bit, VecD a, VecD b) {
  VecU64 wide{};
  for (int i = 0; i < kLanes64; ++i) wide[i] = words[i];
  return (wide & ((1ull << bit) - VecU64{})) != 0 ? a : b;
}

// 2^x for x <= 0 (and a little above), 0 for -inf, NaN for NaN.
//
// x = n + f with |f| <= 1/2. Minimax polynomial of degree 5: relative error 7.5e-8, 1.3 ulp with
// its rounding. Degree 4 (2.6e-6) saves one of six multiply-adds and is not worth a second path.
ANYMASK_INLINE VecF exp2_of(VecF x) {
#if defined(__AVX512F__)
  const VecF clamped = maximum(splat<VecF>(-1000.0f), x);  // the second operand's NaN survives
  const VecF n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VecF f = clamped - n;
#else
  // Adding 1.5 * 2^23 leaves round(x) in the low bits. Below -126 the result is set to 0.
  const VecF clamped = maximum(splat<VecF>(-126.0f), x);
  const VecF shifted = clamped + splat<VecF>(12582912.0f);
  const VecF f = clamped - (shifted - splat<VecF>(12582912.0f));
#endif
  VecF p = splat<VecF>(1.32764721678e-3f);
  p = p * f + splat<VecF>(9.67554133102e-3f);
  p = p * f + splat<VecF>(5.55071327288e-2f);
  p = p * f + splat<VecF>(2.4022119724e-1f);
  p = p * f + splat<VecF>(6.93146967065e-1f);
  p = p * f + splat<VecF>(1.00000007165f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const VecU32 scaled = bit_cast<VecU32>(p) + (bit_cast<VecU32>(shifted) << 23);
  return x < splat<VecF>(-126.0f) ? VecF{} : bit_cast<VecF>(scaled) + (x - clamped);
#endif
}

// The same in double: Taylor's series to degree 13, relative error 4e-18.
ANYMASK_INLINE VecD exp2_of(VecD x) {
  const VecD clamped = maximum(splat<VecD>(-1022.0), x);
  const VecD shifted = clamped + splat<VecD>(6755399441055744.0);
  const VecD f = clamped - (shifted - splat<VecD>(6755399441055744.0));
  VecD p = splat<VecD>(1.3691488853904128881e-12);
  p = p * f + splat<VecD>(2.5678435993488205142e-11);
  p = p * f + splat<VecD>(4.4455382718708114976e-10);
  p = p * f + splat<VecD>(7.0549116208011233299e-9);
  p = p * f + splat<VecD>(1.0178086009239699727e-7);
  p = p * f + splat<VecD>(1.3215486790144309488e-6);
  p = p * f + splat<VecD>(0.00001525273380405984028);
  p = p * f + splat<VecD>(0.00015403530393381609954);
  p = p * f + splat<VecD>(0.0013333558146428443423);
  p = p * f + splat<VecD>(0.009618129107628477162);
  p = p * f + splat<VecD>(0.055504108664821579953);
  p = p * f + splat<VecD>(0.24022650695910071233);
  p = p * f + splat<VecD>(0.69314718055994530942);
  p = p * f + splat<VecD>(1.0);
  const VecU64 scaled = bit_cast<VecU64>(p) + (bit_cast<VecU64>(shifted) << 52);
  return x < splat<VecD>(-1022.0) ? VecD{} : bit_cast<VecD>(scaled) + (x - clamped);
}

// ---- transposing a square of registers ----------------------------------------------------------

template <int... kIndex>
struct Sequence {};
template <int kCount, int... kIndex>
struct MakeSequence : MakeSequence<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeSequence<0, kIndex...> {
  using type = Sequence<kIndex...>;
};

// Swaps the off-diagonal blocks of `kStep` lanes between registers a and b.
template <int kStep, class V, int... kLane>
ANYMASK_INLINE void exchange(V& a, V& b, Sequence<kLane...>) {
  constexpr int kCount = static_cast<int>(sizeof...(kLane));
  const V upper =
      __builtin_shufflevector(a, b, ((kLane & kStep) == 0 ? kLane : kCount + kLane - kStep)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) == 0 ? kLane + kStep : kCount + kLane)...);
  a = upper;
}

template <int kStep, class V, int kCount>
ANYMASK_INLINE void transpose_from(V (&r)[kCount]) {
  ANYMASK_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if ((i & kStep) == 0) {
      exchange<kStep>(r[i], r[i + kStep], typename MakeSequence<kCount>::type{});
    }
  }
  if constexpr (kStep > 1) transpose_from<kStep / 2>(r);
}
// r[i][j] becomes r[j][i]; kCount registers of kCount lanes.
template <class V, int kCount>
ANYMASK_INLINE void transpose(V (&r)[kCount]) {
  transpose_from<kCount / 2>(r);
}

}  // namespace anymask::cpu::ANYMASK_ISA
