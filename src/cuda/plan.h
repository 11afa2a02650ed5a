// Builds plans on the device. Everything is queued on the caller's stream, writes only into the
// caller's memory, never waits for the device and can be captured in a graph.
#pragma once

#include <variant>
#include <vector>

#include "cuda/device/plan_params.h"
#include "cuda/kernel.h"
#include "plan/view.h"

namespace anymask::cuda {

// Fills all of a plan whose buffer is device memory. `lowered` is the mask as it was before
// plan::view put packed words in place of its dense leaves.
void build_plan(const rules::Program& lowered, const plan::Plan& plan, int ordinal,
                CuStream stream);

// The launches that build_plan makes, in order. Apart for tests, which run the kernels on the CPU.
struct PlanStep {
  KernelConfig config;
  Grid grid;
  std::variant<PackParams, ClassifyParams, OrderParams> params;
};
std::vector<PlanStep> plan_steps(const rules::Program& lowered, const plan::Plan& plan);

// Every variant.
std::vector<KernelConfig> plan_kernels();

}  // namespace anymask::cuda
