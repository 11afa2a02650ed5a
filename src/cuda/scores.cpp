#include "cuda/scores.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "rules/philox.h"

namespace anymask::cuda {
namespace {

constexpr double kLeastFactor = 1e-30;

// `dimensions`: of batch, head, row and key in the tensor, -1 where it has none.
Numbers numbers_of(const Tensor& t, const int (&dimensions)[4], int64_t q_heads) {
  Numbers numbers{};
  numbers.divisor = 1;
  if (!t.given()) return numbers;
  numbers.data = t.data;
  numbers.wide = t.dtype == DType::f32 ? 1 : 0;
  int64_t* const strides[4] = {&numbers.batch_stride, &numbers.head_stride, &numbers.row_stride,
                               &numbers.key_stride};
  for (int i = 0; i < 4; ++i) {
    const int dimension = dimensions[i];
    if (dimension >= 0 && t.shape[dimension] > 1) *strides[i] = t.stride[dimension];
  }
  const int head = dimensions[1];
  if (t.shape[head] > 0) numbers.divisor = static_cast<int32_t>(q_heads / t.shape[head]);
  return numbers;
}

// How many neighbours of a row of biases can be read at once: 8 (16 bytes), 2 or 1.
int32_t readable_at_once(const Numbers& bias, int64_t kv_len, bool reordered) {
  if (bias.key_stride != 1 || reordered) return 1;
  const auto address = reinterpret_cast<uintptr_t>(bias.data);
  for (const int count : {8, 2}) {
    if (count == 8 && bias.wide != 0) continue;
    const auto bytes = static_cast<uintptr_t>(count * (bias.wide != 0 ? 4 : 2));
    if (address % bytes == 0 && kv_len % count == 0 && bias.batch_stride % count == 0 &&
        bias.head_stride % count == 0 && bias.row_stride % count == 0) {
      return count;
    }
  }
  return 1;
}

}  // namespace

int32_t features_of(const ScoreOptions& scores) {
  int32_t features = 0;
  if (scores.softcap > 0) features |= kSoftcap;
  if (scores.key_bias.given()) features |= kKeyBias;
  if (scores.bias.given()) features |= kBias;
  if (rules::dropout_threshold(scores.dropout_p) > 0) features |= kDropout;
  return features;
}

bool bounded_by_cap(const ScoreOptions& scores, bool half) {
  constexpr double kLargest = 55;  // 2^80: times a million keys and values of 30000 2^115
  return scores.softcap > 0 && scores.softcap <= kLargest && !half && !scores.key_bias.given() &&
         !scores.bias.given();
}

double score_factor(const ScoreOptions& scores, double scale) {
  return std::max(scores.softcap > 0 ? scores.softcap : std::abs(scale), kLeastFactor);
}

CapCurve cap_curve(double scale, double softcap) {
  // The odd polynomial of degree 9 that is nearest to tanh on [-1, 1]: 2.8e-6 away at most.
  constexpr double kTerms[5] = {0.999968469461572, -0.33265823193061783, 0.12922066808799793,
                                -0.043299862941339494, 0.00836588618654383};
  const double factor = scale / std::max(softcap, kLeastFactor);
  CapCurve curve{};
  curve.factor = static_cast<float>(factor);
  double power = factor;
  for (int i = 0; i < 5; ++i, power *= factor * factor) {
    curve.terms[i] = static_cast<float>(kTerms[i] * power);
  }
  const double limit = 1.0 / std::max(std::abs(factor), kLeastFactor);
  // Terms too small for a float are missed beyond scores of a thousand.
  const bool exact = std::abs(curve.terms[4]) >= FLT_MIN || factor == 0;
  curve.limit = static_cast<float>(exact ? limit : std::min(limit, 1000.0));
  constexpr double kLog2E = 1.4426950408889634;
  curve.exponent = static_cast<float>(2 * kLog2E * factor);
  // Relative minimax fits of tanh(u) / u and 1 - tanh^2(u) in u^2 on [0, 9 / 16].
  constexpr double kNear[3] = {0.9997852040874916, -0.32629673101442, 0.0973554703991093};
  constexpr double kNearSlopes[3] = {0.9984189073284114, -0.9520694024228141, 0.4255579290641544};
  power = 1;
  for (int i = 0; i < 3; ++i, power *= factor * factor) {
    curve.near[i] = static_cast<float>(kNear[i] * power * factor * softcap * kLog2E);
    curve.near_slopes[i] = static_cast<float>(kNearSlopes[i] * power);
  }
  curve.near_limit = 0.75f * curve.limit;
  return curve;
}

ScoreParams score_params(const ScoreOptions& scores, const Problem& problem, double scale,
                         bool reordered) {
  ScoreParams params{};
  params.sink = numbers_of(scores.sink, {-1, 0, -1, -1}, problem.q_heads);
  params.key_bias = numbers_of(scores.key_bias, {0, 1, -1, 2}, problem.q_heads);
  params.bias = numbers_of(scores.bias, {0, 1, 2, 3}, problem.q_heads);
  params.bias_at_once = readable_at_once(params.bias, problem.kv_len, reordered);
  const double factor = score_factor(scores, scale);
  // Where biases come before the sign of a negative scale, it has to bring them back.
  const bool negative = scale < 0 && !(scores.softcap > 0);
  params.bias_factor = static_cast<float>((negative ? -1.0 : 1.0) / factor);
  if (scores.softcap > 0) params.cap = cap_curve(scale, scores.softcap);
  const uint32_t threshold = rules::dropout_threshold(scores.dropout_p);
  params.drop_digits = rules::digits_of(threshold);
  params.keep_scale = static_cast<float>(rules::dropout_scale(threshold));
  params.seed_offset = static_cast<const int64_t*>(scores.seed_offset.data);
  return params;
}

}  // namespace anymask::cuda
