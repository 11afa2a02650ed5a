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
// Beside kSoftcap: scores stay so near 0 that exp2 needs no maximum to be measured from. Set by the
// forward pass alone, see bounded_by_cap.
inline constexpr int32_t kBounded = 16;
// Beside kBias: its rows are of 16-bit numbers and whole 16 bytes. The forward pass reads them so
// (pair_bias.h); of the backward pass the copy engine brings them and takes their gradients
// (backward_bias_tiles.h), which asks for a little more.
inline constexpr int32_t kBiasTiles = 32;

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
  // For |k s| up to 3 / 4, where nearly all scores are, three terms do: tanh(k s) is s (near[0] +
  // near[1] s^2 + near[2] s^4) to a relative 2^-12, and 1 - tanh^2(k s), as a polynomial in s^2,
  // near_slopes to 2^-9. near's terms are times the cap and log2(e): what exp2 takes.
  float near[3];
  float near_slopes[3];
  float near_limit;
};

struct ScoreParams {
  Numbers sink;      // by head
  Numbers key_bias;  // by batch, head, key
  Numbers bias;      // by batch, head, row, key
  // Scores stay what Q K^T gives, or after the cap its tanh, until exp2 takes them times one
  // factor; biases come to them times this.
  float bias_factor;
  int32_t bias_at_once;  // neighbours of a row of biases that can be read at once: 8, 2 or 1
  CapCurve cap;
  const int64_t* seed_offset;
  uint32_t drop_digits;  // rules::digits_of
  float keep_scale;      // 1 / (1 - p)
};

}  // namespace anymask::cuda
