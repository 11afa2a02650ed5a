// The register-blocked multiplication that every product of both passes is made of.
//
// acc[M][N vectors] += sum over k of a(m, k) * b[k][n]: `a` is read by broadcasts, m * step_m +
// k * step_k bytes from its begin (bytes: the caller's bf16 rows may be an odd number of elements
// apart), rows of `b` are contiguous. An element of `a` and `b` is a number,
// or for bf16 a pair of numbers that lie next to each other along k.
#pragma once

#include "cpu/convert.h"

namespace anymask::cpu::ANYMASK_ISA {

// M x kVectors accumulators: 8 x 2 of AVX-512's 32 registers need 10 loads per 16 multiply-adds
// (Zen 4: one of each a cycle); with 16 registers 6 x 2 leaves room for two of b and one of a.
#if defined(__AVX512F__)
inline constexpr int kBlock = 8;
#else
inline constexpr int kBlock = 6;
#endif
inline constexpr int kUnroll = 2;
inline constexpr int kVectors = 2;

struct MathF32 {
  using T = float;  // sums
  using Vec = VecF;
  using Item = float;  // elements of the operands
  using Items = VecF;
  static constexpr int kPair = 1;
  static ANYMASK_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return a * b + c; }
};
struct MathF64 {
  using T = double;
  using Vec = VecD;
  using Item = double;
  using Items = VecD;
  static constexpr int kPair = 1;
  static ANYMASK_INLINE VecD multiply_add(VecD a, VecD b, VecD c) { return a * b + c; }
};
#if defined(__AVX512BF16__)
struct MathBf16 {
  using T = float;
  using Vec = VecF;
  using Item = uint32_t;
  using Items = VecU32;
  static constexpr int kPair = 2;
  static ANYMASK_INLINE VecF multiply_add(VecU32 a, VecU32 b, VecF c) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};
// Rounds two rows of floats to pairs: element i is (low[i], high[i]).
ANYMASK_INLINE VecU32 pairs_of(VecF low, VecF high) {
  const __m512i side_by_side = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bit_cast<VecU32>(_mm512_permutexvar_epi16(order, side_by_side));
}
#endif

template <class Math>
inline constexpr int kLanesOf = Lanes<typename Math::Vec>::kCount;
// Rows or keys that are worked on side by side in the lanes of kVectors registers.
template <class Math>
inline constexpr int kStrip = kVectors* kLanesOf<Math>;

template <class Math, int M, int N>
struct Block {
  typename Math::Vec at[M][N];
};

template <class Math, int M, int N>
ANYMASK_INLINE void multiply(Block<Math, M, N>& acc, const void* a_begin, int64_t step_m,
                             int64_t step_k, const typename Math::Item* b, int64_t b_stride,
                             int depth) {
  using Items = typename Math::Items;
  const char* a = static_cast<const char*>(a_begin);
  const auto step = [&](int u) {
    Items rows[N];
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) rows[n] = load<Items>(b + u * b_stride + n * kLanesOf<Math>);
    ANYMASK_UNROLL
    for (int m = 0; m < M; ++m) {
      const Items x = splat<Items>(load_scalar<typename Math::Item>(a + m * step_m + u * step_k));
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) acc.at[m][n] = Math::multiply_add(x, rows[n], acc.at[m][n]);
    }
  };
  int k = 0;
  for (; k + kUnroll <= depth; k += kUnroll) {
    ANYMASK_UNROLL
    for (int u = 0; u < kUnroll; ++u) step(u);
    a += kUnroll * step_k;
    b += kUnroll * b_stride;
  }
  for (; k < depth; ++k) {
    step(0);
    a += step_k;
    b += b_stride;
  }
}

template <class Math, int M, int N>
ANYMASK_INLINE void clear(Block<Math, M, N>& acc) {
  ANYMASK_UNROLL
  for (int m = 0; m < M; ++m) {
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) acc.at[m][n] = typename Math::Vec{};
  }
}
template <class Math, int M, int N>
ANYMASK_INLINE void add_block(Block<Math, M, N>& acc, const typename Math::T* from,
                              int64_t stride) {
  ANYMASK_UNROLL
  for (int m = 0; m < M; ++m) {
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) {
      acc.at[m][n] += load<typename Math::Vec>(from + m * stride + n * kLanesOf<Math>);
    }
  }
}
template <class Math, int M, int N>
ANYMASK_INLINE void store_block(const Block<Math, M, N>& acc, typename Math::T* to,
                                int64_t stride) {
  ANYMASK_UNROLL
  for (int m = 0; m < M; ++m) {
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) store(to + m * stride + n * kLanesOf<Math>, acc.at[m][n]);
  }
}

// Calls body.run<M>(m) for m = begin, begin + kBlock, ...; the last call takes what is left.
template <int M, class Body>
ANYMASK_INLINE void last_block(const Body& body, int m, int count) {
  if constexpr (M > 0) {
    if (count == M) {
      body.template run<M>(m);
    } else {
      last_block<M - 1>(body, m, count);
    }
  }
}
template <class Body>
ANYMASK_INLINE void for_blocks(int begin, int end, const Body& body) {
  int m = begin;
  for (; m + kBlock <= end; m += kBlock) body.template run<kBlock>(m);
  last_block<kBlock - 1>(body, m, end - m);
}

// The same for a number of them that the compiler knows.
template <int kCount, class Body>
ANYMASK_INLINE void for_blocks_in(int begin, const Body& body) {
  constexpr int kWhole = kCount / kBlock * kBlock;
  for (int m = 0; m < kWhole; m += kBlock) body.template run<kBlock>(begin + m);
  if constexpr (kWhole < kCount) body.template run<kCount - kWhole>(begin + kWhole);
}

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// exp2's factor. A negative scale changes the sign of Q or K instead, so that a row's largest raw
// score is always its largest score; zero becomes tiny, so that -inf * factor stays -inf.
template <class T>
ANYMASK_INLINE T exponent_factor(double scale) {
  const double factor = (scale < 0 ? -scale : scale) * kLog2E;
  return static_cast<T>(factor < 1e-37 ? 1e-37 : factor);
}

}  // namespace anymask::cpu::ANYMASK_ISA
