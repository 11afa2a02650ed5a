// Checks of a call's tensors; every failure names the argument, what it got and what it needs.
#pragma once

#include "anymask/attention.hpp"

namespace anymask {

// q, k and v agree with each other and with the contract; returns the problem that they state.
Problem check_inputs(const Tensor& q, const Tensor& k, const Tensor& v);

// Every option by itself, and what goes together.
void check_scores(const ScoreOptions& scores, const Problem& problem);

void check_score_gradients(const ScoreGradientViews& gradients, const ScoreOptions& scores);

void check_forward(const ForwardArgs& args, const Problem& problem);
void check_backward(const BackwardArgs& args, const Problem& problem);

// The given scale, or 1 / sqrt(head_dim).
double check_scale(const std::optional<double>& scale, const Problem& problem);

}  // namespace anymask
