// What the backward pass knows of a query row before it begins.
//
// dS = P (dP - (rowsum(dO O) - dlse)), so what is taken from dP is one number a row, as is what is
// taken from S. Rows that see nothing or do not exist get an lse so large that their P is 0; it
// must not be infinite, since products with constants of 0 meet it too.
#pragma once

#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/softmax.h"  // kMinusInfinity

namespace anymask::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float two_to(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// What is left of `value` after its part in units of 2^exponent, which goes to `part`.
template <bool kHalf>
__device__ __forceinline__ float take_part(float value, int exponent, uint32_t& part) {
  const float unit = two_to(exponent), inverse = two_to(-exponent);
  part = (kHalf ? ptx::pack_f16(value * inverse, 0.0f) : ptx::pack_bf16(value * inverse, 0.0f)) &
         0xffffu;
  return value - ptx::low_of<kHalf>(part) * unit;
}

// A row's numbers: see kRowStats.
template <bool kHalf>
__device__ __forceinline__ void store_stats(const BackwardParams& p, uint16_t* to, bool sees,
                                            float lse, float sum) {
  constexpr float kHuge = 60000.0f;  // in fp16 too
  uint32_t parts[kRowStats] = {};
  if (sees) {
    float left = lse * kLog2E / -p.scale_log2;
#pragma unroll
    for (int i = 0; i < kLseParts; ++i) left = take_part<kHalf>(left, p.lse_exponent, parts[i]);
  } else {
    take_part<kHalf>(p.scale_log2 > 0 ? -kHuge : kHuge, 0, parts[0]);
  }
  float left = -sum;
#pragma unroll
  for (int i = 0; i < kSumParts; ++i) {
    left = take_part<kHalf>(left, sum_exponent(i), parts[kLseParts + i]);
  }
  ptx::store_global(to, parts[0] | parts[1] << 16, parts[2] | parts[3] << 16,
                    parts[4] | parts[5] << 16, parts[6] | parts[7] << 16);
}

// A row's numbers as they were before they were taken apart: its lse times log2(e), or what leaves
// nothing of any score, and its sum.
struct RowNumbers {
  float lse, sum;
};

template <bool kHalf>
__device__ __forceinline__ RowNumbers read_stats(const BackwardParams& p,
                                                 const uint16_t (&of_row)[kRowStats]) {
  const uint4 all = *reinterpret_cast<const uint4*>(of_row);
  const uint32_t pairs[4] = {all.x, all.y, all.z, all.w};
  const auto part = [&](int i) {
    const uint32_t pair = pairs[i / 2];
    return i % 2 == 0 ? ptx::low_of<kHalf>(pair) : ptx::high_of<kHalf>(pair);
  };
  float lse = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = kLseParts - 1; i >= 0; --i) lse += part(i);
#pragma unroll
  for (int i = kSumParts - 1; i >= 0; --i) {
    sum = __fmaf_rn(part(kLseParts + i), two_to(sum_exponent(i)), sum);
  }
  return {-lse * two_to(p.lse_exponent) * p.scale_log2, -sum};
}

// The natural log and its gradient of a row: -infinity where it does not exist or sees nothing.
struct RowLse {
  float lse, grad;
};

// at: of [batch][q_heads][q_len].
__device__ __forceinline__ RowLse read_lse(const BackwardParams& p, int64_t at, bool exists) {
  return {exists ? p.lse[at] : kMinusInfinity,
          exists && p.lse_grad != nullptr ? p.lse_grad[at] : 0.0f};
}

// Stores what is known of row `in_tile` of a row tile. sum: of dO O.
template <bool kHalf>
__device__ __forceinline__ void store_row(const BackwardParams& p, int64_t row_tile, int in_tile,
                                          const RowLse& of, float sum) {
  const bool sees = of.lse > kMinusInfinity;
  sum = sees ? sum - of.grad : 0.0f;
  store_stats<kHalf>(p, p.stats + (row_tile * kBackwardRows + in_tile) * kRowStats, sees, of.lse,
                     sum);
  if (p.row_numbers != nullptr) {
    float* numbers = p.row_numbers + row_tile * (2 * kBackwardRows) + in_tile;
    numbers[kLseOfRow * kBackwardRows] = sees ? of.lse * kLog2E : -kMinusInfinity;
    numbers[kSumOfRow * kBackwardRows] = sum;
  }
}

}  // namespace anymask::cuda
