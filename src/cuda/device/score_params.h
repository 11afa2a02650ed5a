// A call's score options (anymask::ScoreOptions) as the attention kernels take them. Host and
// device.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

// What a kernel variant does to scores beside scale and mask: bits of its config's `features`. A
// sink is a few instructions a row, so it has none.
inline constexpr int32_t kSoftcap = 1;
inline constexpr int32_t kKeyBias = 2;
inline constexpr int32_t kBias = 4;
inline constexpr int32_t kDropout = 8;

// Numbers of q's type or float32; strides in elements, 0 where one number serves all.
struct Numbers {
  const void* data;  // null: none
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t key_stride;
  int32_t wide;     // 1: float32
  int32_t divisor;  // query heads that share one of its heads
};

// tanh(k s) without the special function unit, which exp2 keeps busy: for |s| up to `limit` an odd
// polynomial, s (terms[0] + terms[1] s^2 + ...), k taken into its terms; beyond it
// 1 - 2 / (1 + 2^(exponent s)). Absolute error below 4e-6 and 1e-6: times a cap of 50, a tenth of
// bf16's rounding of the weight.
struct CapCurve {
  float factor;  // k
  float terms[5];
  float limit;
  float exponent;
};

struct ScoreParams {
  Numbers sink;      // by head
  Numbers key_bias;  // by batch, head, key
  Numbers bias;      // by batch, head, row, key
  // Scores stay what Q K^T gives, or after the cap its tanh, until exp2 takes them times one
  // factor; biases come to them times this.
  float bias_factor;
  int32_t bias_pairs;  // 1: two neighbours of a row of biases can be read at once
  CapCurve cap;
  const int64_t* seed_offset;
  uint32_t drop_digits;  // rules::digits_of
  float keep_scale;      // 1 / (1 - p)
};

}  // namespace anymask::cuda
