// The register-blocked multiplication that every product of both passes is made of, and the packing
// of its operands.
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
  using T = float;       // sums
  using Vec = VecF;
  using Item = float;    // elements of the operands
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
inline constexpr int kStrip = kVectors * kLanesOf<Math>;

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
      const Items x =
          splat<Items>(load_scalar<typename Math::Item>(a + m * step_m + u * step_k));
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

// ---- packing ------------------------------------------------------------------------------------

ANYMASK_INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

// How operands of `In` become items of `Math`: numbers are widened, pairs are taken as they lie.
template <class Math, class In>
ANYMASK_INLINE typename Math::Items load_items(const typename In::Raw* from, int count) {
  if constexpr (Math::kPair == 2) {
    constexpr int kLanes = kLanesOf<Math>;
    return count >= kLanes ? load<typename Math::Items>(from)
                           : load_first<typename Math::Items>(from, count);
  } else {
    return load_as<In>(from, count);
  }
}

template <class Math>
ANYMASK_INLINE typename Math::Items negated(typename Math::Items x) {
  if constexpr (Math::kPair == 2) {
    return x ^ 0x80008000u;
  } else {
    return -x;
  }
}

// Rows of items to strips of columns: to[strip][item][row in strip]; rows that do not exist are 0.
// `items` per row: head_dim / kPair. `flip`: changes the sign.
template <class Math, class In>
inline void pack_transposed(const typename In::Raw* from, int64_t stride, int rows, int strips,
                            int items, bool flip, typename Math::Item* to) {
  using Items = typename Math::Items;
  constexpr int kLanes = kLanesOf<Math>;
  for (int first = 0; first < strips * kStrip<Math>; first += kLanes) {
    typename Math::Item* strip = to +
        static_cast<int64_t>(first / kStrip<Math>) * items * kStrip<Math> + first % kStrip<Math>;
    for (int item = 0; item < items; item += kLanes) {
      const int count = items - item < kLanes ? items - item : kLanes;
      Items square[kLanes];
      ANYMASK_UNROLL
      for (int r = 0; r < kLanes; ++r) {
        square[r] = Items{};
        if (first + r < rows) {
          square[r] = load_items<Math, In>(from + (first + r) * stride + item * Math::kPair, count);
        }
      }
      transpose(square);
      for (int i = 0; i < count; ++i) {
        store(strip + static_cast<int64_t>(item + i) * kStrip<Math>,
              flip ? negated<Math>(square[i]) : square[i]);
      }
    }
  }
}

// Rows of items as they are: to[row][item], zeros from `rows` up to `padded_rows` and from
// head_dim / kPair up to a whole vector.
template <class Math, class In>
inline void pack_rows(const typename In::Raw* from, int64_t stride, int rows, int padded_rows,
                      int items, typename Math::Item* to, int64_t to_stride) {
  using Items = typename Math::Items;
  constexpr int kLanes = kLanesOf<Math>;
  for (int r = 0; r < padded_rows; ++r) {
    for (int item = 0; item < items; item += kLanes) {
      const int count = items - item < kLanes ? items - item : kLanes;
      store(to + r * to_stride + item,
            r < rows ? load_items<Math, In>(from + r * stride + item * Math::kPair, count)
                     : Items{});
    }
  }
}

// Rows as the right operand of a product that sums over rows: numbers as in pack_rows, bf16 as
// pairs of neighbouring rows, to[row / 2][column]. `padded_rows` is even where pairs are made.
template <class Math, class In>
inline void pack_depth(const typename In::Raw* from, int64_t stride, int rows, int padded_rows,
                       int columns, typename Math::Item* to, int64_t to_stride) {
  if constexpr (Math::kPair == 1) {
    pack_rows<Math, In>(from, stride, rows, padded_rows, columns, to, to_stride);
  } else {
    constexpr int kLanes = kLanesOf<Math>;
    const auto row = [&](int r, int column, int count) {
      VecU16 x{};
      if (r < rows) {
        const typename In::Raw* at = from + r * stride + column;
        x = count >= kLanes ? load<VecU16>(at) : load_first<VecU16>(at, count);
      }
      return __builtin_convertvector(x, VecU32);
    };
    for (int r = 0; r < padded_rows; r += 2) {
      for (int column = 0; column < columns; column += kLanes) {
        const int count = columns - column < kLanes ? columns - column : kLanes;
        store(to + (r / 2) * to_stride + column,
              row(r, column, count) | (row(r + 1, column, count) << 16));
      }
    }
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
