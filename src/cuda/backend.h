// The CUDA backend's door: calls that are already checked. Mirrors cpu/backend.h.
#pragma once

#include "anymask/attention.hpp"
#include "plan/view.h"

namespace anymask::cuda {

// The tiles that the kernels work on for this problem.
plan::TileShapes tile_shapes(const Problem& problem);

// Scratch memory behind the plan's own sections, for building it.
int64_t plan_scratch(const rules::Program& lowered);

void build_plan(const rules::Program& lowered, const plan::Plan& plan, void* scratch,
                const Problem& problem, void* stream);

int64_t forward_workspace(const rules::Program& lowered, const Problem& problem);
int64_t backward_workspace(const rules::Program& lowered, const Problem& problem,
                           bool deterministic, const ScoreOptions& scores,
                           const ScoreGradientViews& gradients);

void forward(const ForwardArgs& args, const Problem& problem, const plan::Plan& plan, double scale);
void backward(const BackwardArgs& args, const Problem& problem, const plan::Plan& plan,
              double scale);

}  // namespace anymask::cuda
