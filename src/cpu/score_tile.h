// What happens to a tile's scores between the two products: softcap, biases, dropout. Passes of
// their own over scores that lie in L1, so that tiles without them run the same code as ever.
#pragma once

#include "cpu/kernels.h"
#include "cpu/packing.h"

namespace anymask::cpu::ANYMASK_ISA {

// ---- tanh ---------------------------------------------------------------------------------------

// Levels of the continued fraction tanh x = x / (1 + x^2 / (3 + x^2 / (5 + ...))): relative errors
// of 7e-10 and 6e-18 at 5/8.
template <class T>
inline constexpr int kTanhLevels = 5;
template <>
inline constexpr int kTanhLevels<double> = 8;

// Relative error of a few ulp everywhere: where x is small 1 - exp(-2 x) would cancel.
template <class Vec>
ANYMASK_INLINE Vec tanh_of(Vec x) {
  using T = typename Lanes<Vec>::T;
  using Bits = typename Lanes<Vec>::Bits;
  const Bits sign = bit_cast<Bits>(x) & bit_cast<Bits>(splat<Vec>(T{-0.0}));
  const Vec size = bit_cast<Vec>(bit_cast<Bits>(x) ^ sign);
  // The fraction as a / b, from its lowest level up.
  constexpr int kLevels = kTanhLevels<T>;
  const Vec square = size * size;
  Vec a = splat<Vec>(T{2 * kLevels - 1}), b = splat<Vec>(T{1});
  ANYMASK_UNROLL
  for (int level = kLevels - 1; level > 0; --level) {
    const Vec above = a * splat<Vec>(static_cast<T>(2 * level - 1)) + square * b;
    b = a;
    a = above;
  }
  const Vec e = exp2_of(size * splat<Vec>(static_cast<T>(-2 * kLog2E)));
  const auto large = size > splat<Vec>(T{0.625});
  const Vec one = splat<Vec>(T{1});
  const Vec result = (large ? one - e : size * b) / (large ? one + e : a);
  return bit_cast<Vec>(bit_cast<Bits>(result) | sign);
}

// ---- biases -------------------------------------------------------------------------------------

template <class T>
struct PlainMath;
template <>
struct PlainMath<float> {
  using Math = MathF32;
  using In = InF32;
};
template <>
struct PlainMath<double> {
  using Math = MathF64;
  using In = InF64;
};

// A tile's biases as sums with a row a lane: to[strip][key][row in strip], `keys` keys a strip.
template <class Math, class In>
inline void pack_biases_by_key(const TileBiases& biases, int rows, int keys, typename Math::T* to) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  using Plain = PlainMath<T>;
  const int strips = round_up(rows, kStrip<Math>) / kStrip<Math>;
  const void* pairs = biases.pairs.data;
  if (pairs != nullptr && biases.wide) {
    pack_transposed<typename Plain::Math, typename Plain::In>(
        static_cast<const T*>(pairs), biases.pairs.stride, rows, strips, keys, false, to);
  } else if (pairs != nullptr) {
    pack_transposed<typename Plain::Math, In>(static_cast<const typename In::Raw*>(pairs),
                                              biases.pairs.stride, rows, strips, keys, false, to);
  }
  if (biases.keys == nullptr) return;
  for (int strip = 0; strip < strips; ++strip) {
    for (int key = 0; key < keys; ++key) {
      const Vec bias = splat<Vec>(static_cast<T>(biases.keys[key]));
      T* at = to + (static_cast<int64_t>(strip) * keys + key) * kStrip<Math>;
      for (int n = 0; n < kStrip<Math>; n += kLanesOf<Math>) {
        store(at + n, pairs == nullptr ? bias : load<Vec>(at + n) + bias);
      }
    }
  }
}

// The same with a key a lane: to[row][key], rows `stride` apart, zeros in rows up to `padded_rows`
// and in keys up to `stride`.
template <class Math, class In>
inline void pack_biases_by_row(const TileBiases& biases, int rows, int padded_rows, int keys,
                               typename Math::T* to, int stride) {
  using T = typename Math::T;
  using Plain = PlainMath<T>;
  for (int64_t i = 0; i < static_cast<int64_t>(padded_rows) * stride; ++i) to[i] = T{};
  const void* pairs = biases.pairs.data;
  if (pairs != nullptr && biases.wide) {
    pack_rows<typename Plain::Math, typename Plain::In>(
        static_cast<const T*>(pairs), biases.pairs.stride, rows, rows, keys, to, stride);
  } else if (pairs != nullptr) {
    pack_rows<typename Plain::Math, In>(static_cast<const typename In::Raw*>(pairs),
                                        biases.pairs.stride, rows, rows, keys, to, stride);
  }
  if (biases.keys == nullptr) return;
  for (int row = 0; row < rows; ++row) {
    for (int key = 0; key < keys; ++key) to[row * stride + key] += static_cast<T>(biases.keys[key]);
  }
}

// What exp2 multiplies scores with: logits are in natural units.
template <class T>
ANYMASK_INLINE T exp2_factor(const ScoreChanges& changes, double scale) {
  return changes.any ? static_cast<T>(kLog2E) : exponent_factor<T>(scale);
}

// ---- scores to logits ---------------------------------------------------------------------------

// x = scale * score, capped; and, for gradients, d x / d (scale * score).
template <class Vec>
struct Capping {
  using T = typename Lanes<Vec>::T;
  bool capped;
  Vec factor, cap;

  ANYMASK_INLINE Capping(const ScoreChanges& changes, double scale) : capped(changes.softcap > 0) {
    const double size = scale < 0 ? -scale : scale;  // the sign is in q or k already
    factor = splat<Vec>(static_cast<T>(capped ? size / changes.softcap : size));
    cap = splat<Vec>(static_cast<T>(changes.softcap));
  }
  ANYMASK_INLINE Vec of(Vec score, Vec* slope) const {
    const Vec x = score * factor;
    *slope = splat<Vec>(T{1});
    if (!capped) return x;
    const Vec t = tanh_of(x);
    *slope -= t * t;
    return t * cap;
  }
};

// A strip's scores [key][row] to logits in place, and the rows' maxima raised to theirs. Pairs that
// the mask hides are -inf before and after. Not inlined: it would cost its caller registers.
template <class Math, int N>
__attribute__((noinline)) void make_logits(const ScoreChanges& changes, double scale,
                                           const typename Math::T* biases, int keys,
                                           typename Math::T* scores, typename Math::T* highest_at) {
  using Vec = typename Math::Vec;
  const Capping<Vec> capping(changes, scale);
  const Vec hidden = splat<Vec>(-__builtin_inff());
  Vec highest[N];
  for (int n = 0; n < N; ++n) highest[n] = load<Vec>(highest_at + n * kLanesOf<Math>);
  for (int key = 0; key < keys; ++key) {
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) {
      const int64_t at = static_cast<int64_t>(key) * kStrip<Math> + n * kLanesOf<Math>;
      const Vec score = load<Vec>(scores + at);
      Vec slope;
      Vec logit = capping.of(score, &slope);
      if (biases != nullptr) logit += load<Vec>(biases + at);
      logit = score == hidden ? hidden : logit;
      highest[n] = maximum(logit, highest[n]);
      store(scores + at, logit);
    }
  }
  for (int n = 0; n < N; ++n) store(highest_at + n * kLanesOf<Math>, highest[n]);
}

// ---- dropout ------------------------------------------------------------------------------------

// Clears the weights [key][row] of a strip (bf16: pairs of keys) that are dropped. `kept`: words of
// the strip's first key; `shift`: its first row's bit.
template <class Math, int N>
__attribute__((noinline)) void drop_weights(const uint32_t* kept, int shift, int keys,
                                            typename Math::T* weights) {
  using Vec = typename Math::Vec;
  for (int key = 0; key < keys; key += Math::kPair) {
    ANYMASK_UNROLL
    for (int n = 0; n < N; ++n) {
      const int lane = n * kLanesOf<Math>;
      typename Math::T* at =
          weights + static_cast<int64_t>(key / Math::kPair) * kStrip<Math> + lane;
      const Vec p = load<Vec>(at);
      const uint32_t word = kept[key] >> (shift + lane);
      if constexpr (Math::kPair == 1) {
        store(at, select_bits(word, p, Vec{}));
      } else {
        const VecU32 pair = bit_cast<VecU32>(p);
        const Vec first = bit_cast<Vec>(pair & 0xffffu), second = bit_cast<Vec>(pair & 0xffff0000u);
        const Vec low = select_bits(word, first, Vec{});
        const Vec high = select_bits(kept[key + 1] >> (shift + lane), second, Vec{});
        store(at, bit_cast<VecU32>(low) | bit_cast<VecU32>(high));
      }
    }
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
