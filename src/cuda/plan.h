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
// plan::view put packed words in place of its dense leaves. `scratch`: plan_scratch_bytes of device
// memory, 8-byte aligned, that nobody else writes until the work is done.
void build_plan(const rules::Program& lowered, const plan::Plan& plan, void* scratch, int ordinal,
                CuStream stream);

// 0 unless keys are to be reordered: then 24 bytes a key and place, and a little.
int64_t plan_scratch_bytes(const rules::Program& lowered);

// The launches that build_plan makes, in order. Apart for tests, which run the kernels on the CPU.
struct PlanStep {
  KernelConfig config;
  Grid grid;
  std::variant<PackParams, KeyOrderParams, ClassifyParams, OrderParams, BakeParams> params;
};
std::vector<PlanStep> plan_steps(const rules::Program& lowered, const plan::Plan& plan,
                                 void* scratch);

// Every variant.
std::vector<KernelConfig> plan_kernels();

}  // namespace anymask::cuda
