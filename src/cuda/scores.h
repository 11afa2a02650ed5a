// A call's score options as the attention kernels take them, host side.
#pragma once

#include "anymask/attention.hpp"
#include "cuda/device/score_params.h"

namespace anymask::cuda {

// The bits of a variant's `features`.
int32_t features_of(const ScoreOptions& scores);

// Whether a cap keeps exp2 of all scores, and the sums of a million, far inside float32 and bf16
// (which fp16's range is too small for), so that a row's maximum has nothing to prevent.
bool bounded_by_cap(const ScoreOptions& scores, bool half);

// `problem`: of the call's views. reordered: keys come in a plan's order.
ScoreParams score_params(const ScoreOptions& scores, const Problem& problem, double scale,
                         bool reordered);

// What scores are multiplied with, under a cap their tanh: never 0, so that what is hidden, -inf,
// stays so. A negative scale's sign goes to the scores, or into the cap's curve.
double score_factor(const ScoreOptions& scores, double scale);

// tanh(scale s / softcap).
CapCurve cap_curve(double scale, double softcap);

}  // namespace anymask::cuda
