// What happens to scores between Q K^T and exp2 beside scale and mask; the same in both passes.
#pragma once

#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/score_params.h"
#include "rules/philox.h"

namespace anymask::cuda {

// ---- numbers ------------------------------------------------------------------------------------

// kHalf: 16-bit numbers are fp16, else bf16.
template <bool kHalf>
__device__ __forceinline__ float number_at(const Numbers& numbers, const void* first,
                                           int64_t offset) {
  if (numbers.wide != 0) return static_cast<const float*>(first)[offset];
  return ptx::low_of<kHalf>(static_cast<const uint16_t*>(first)[offset]);
}

// The address of the first key's number of a row; rows only matter where there are any.
__device__ __forceinline__ const void* numbers_of(const Numbers& numbers, int batch, int head,
                                                  int row) {
  const int64_t offset = batch * numbers.batch_stride +
                         head / numbers.divisor * numbers.head_stride + row * numbers.row_stride;
  return static_cast<const char*>(numbers.data) + offset * (numbers.wide != 0 ? 4 : 2);
}

// A query head's sink times log2(e); -infinity where there is none.
template <bool kHalf>
__device__ __forceinline__ float sink_log2(const Numbers& sink, int head) {
  if (sink.data == nullptr) return __uint_as_float(0xff800000u);
  constexpr float kLog2E = 1.4426950408889634f;
  return number_at<kHalf>(sink, sink.data, head * sink.head_stride) * kLog2E;
}

// ---- softcap ------------------------------------------------------------------------------------

// tanh of scores in place, by the special function unit: the forward pass. Its relative error of
// 2^-11 is a quarter of what rounding each element of q and k to bf16 does. With the curve below on
// all or half of the scores a causal pass takes 51% or 39% longer than without a cap, so 33%: the
// math warps' own instructions are what there is too little time for.
template <int kCount>
__device__ __forceinline__ void cap_scores_fast(const CapCurve& cap, float (&scores)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) scores[i] = ptx::tanh_fast(scores[i] * cap.factor);
}

// The same for the backward pass, where it costs less (20% against 29%) and its derivative is
// needed too, to the accuracy of CapCurve. The curve for small scores is taken where it
// serves all lanes and kPiece scores of each: no lane waits for another.
template <int kCount>
__device__ __forceinline__ void cap_scores(const CapCurve& cap, float (&scores)[kCount]) {
  constexpr int kPiece = kCount % 32 == 0 ? 32 : kCount;
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kPiece) {
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      largest[i % 2] = fmaxf(largest[i % 2], fabsf(scores[begin + i]));
    }
    if (__any_sync(0xffffffffu, fmaxf(largest[0], largest[1]) > cap.limit)) {
#pragma unroll
      for (int i = begin; i < begin + kPiece; ++i) {
        const float e = ptx::exp2_fast(scores[i] * cap.exponent);
        scores[i] = __fmaf_rn(-2.0f, ptx::reciprocal_fast(1.0f + e), 1.0f);
      }
    } else {
#pragma unroll
      for (int i = begin; i < begin + kPiece; ++i) {
        const float square = scores[i] * scores[i];
        float slope = cap.terms[4];
#pragma unroll
        for (int t = 3; t >= 0; --t) slope = __fmaf_rn(slope, square, cap.terms[t]);
        scores[i] *= slope;
      }
    }
  }
}

// Whether the curve's terms for scores near 0 serve a whole warp's.
template <int kCount>
__device__ __forceinline__ bool all_near(const CapCurve& cap, const float (&scores)[kCount]) {
  float largest[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(scores[i]));
  const float of_all = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  return !__any_sync(0xffffffffu, of_all > cap.near_limit);
}

// What exp2 takes of such a score, plus `added`.
__device__ __forceinline__ float near_exponent(const CapCurve& cap, float score, float added) {
  const float square = score * score;
  float slope = __fmaf_rn(cap.near[2], square, cap.near[1]);
  slope = __fmaf_rn(slope, square, cap.near[0]);
  return __fmaf_rn(score, slope, added);
}

// The same with 1 - tanh^2.
struct NearScore {
  float exponent, slope;
};
__device__ __forceinline__ NearScore near_score(const CapCurve& cap, float score, float added) {
  const float square = score * score;
  const float slope = __fmaf_rn(cap.near_slopes[2], square, cap.near_slopes[1]);
  return {near_exponent(cap, score, added), __fmaf_rn(slope, square, cap.near_slopes[0])};
}

// ---- dropout ------------------------------------------------------------------------------------

struct LaneWords : rules::ScalarWords {
  // One instruction: left to itself the compiler takes two to five.
  static __device__ __forceinline__ Word kept(Word bit, Word lower, uint32_t set) {
    asm("lop3.b32 %0, %1, %0, %2, 0xd4;" : "+r"(lower) : "r"(bit), "r"(set));
    return lower;
  }
};

// Two words at a time: the chain of one Philox leaves its warp waiting half of the time.
struct WordPair {
  uint32_t a, b;
  __device__ __forceinline__ WordPair operator^(WordPair x) const { return {a ^ x.a, b ^ x.b}; }
  __device__ __forceinline__ WordPair operator^(uint32_t x) const { return {a ^ x, b ^ x}; }
  __device__ __forceinline__ WordPair operator+(WordPair x) const { return {a + x.a, b + x.b}; }
  __device__ __forceinline__ WordPair operator+(uint32_t x) const { return {a + x, b + x}; }
  __device__ __forceinline__ WordPair operator~() const { return {~a, ~b}; }
};
struct PairedWords {
  using Word = WordPair;
  static __device__ __forceinline__ void multiply(uint32_t factor, Word x, Word& high, Word& low) {
    LaneWords::multiply(factor, x.a, high.a, low.a);
    LaneWords::multiply(factor, x.b, high.b, low.b);
  }
  static __device__ __forceinline__ Word kept(Word bit, Word lower, uint32_t set) {
    return {LaneWords::kept(bit.a, lower.a, set), LaneWords::kept(bit.b, lower.b, set)};
  }
};

__device__ __forceinline__ rules::Dropout dropout_of(const ScoreParams& scores, int batch,
                                                     int head) {
  return rules::dropout_of(scores.seed_offset[0], scores.seed_offset[1], batch, head,
                           scores.drop_digits);
}

// What a row keeps of keys in any order: a block of the pattern for every key that is not in that
// of the one before it, so slow.
struct KeptInOrder {
  rules::KeptKeys<LaneWords> kept;
  int block = -1;

  // 1: it keeps `key`.
  __device__ __forceinline__ uint32_t bit(const rules::Dropout& dropout, int row, int key) {
    if (key / rules::kDropoutKeys != block) {
      block = key / rules::kDropoutKeys;
      kept = rules::kept_keys<LaneWords>(dropout, row, block);
    }
    const uint32_t word = rules::word_of_key(key) == 0 ? kept.word[0] : kept.word[1];
    return (word >> rules::bit_of_key(key)) & 1;
  }
};

}  // namespace anymask::cuda
