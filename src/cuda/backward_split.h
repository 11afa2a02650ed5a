// The Hopper backward with dQ apart from dK and dV, host side: for masks with so few pairs that
// memory is what a pass waits for, and for sums in one order where chains would be long.
#pragma once

#include <vector>

#include "cuda/backward.h"
#include "cuda/backward_work.h"
#include "cuda/device/sm90/backward_config.h"

namespace anymask::cuda {

enum class SplitUse {
  kNever,
  kByPlan,  // launched beside the main kernel, and split_choice says which of them works
  kAlone,   // nothing else is launched
};

// config: the main kernel's variant.
SplitUse split_use(const rules::Program& program, const Problem& problem,
                   const BackwardConfig& config, const Gpu& gpu);

// When a call comes to it whose use is kByPlan. chunks: of pairs whose chains of sums run side by
// side on `gpu`.
SplitChoice split_choice(const BackwardCall& call, const BackwardConfig& config,
                         const Chunks& chunks);

// The variant for a call.
KernelConfig backward_split_kernel(const BackwardCall& call, const BackwardConfig& config);

// Queues the kernel, which returns at once unless `params.choice` is to split. params: as the main
// kernel has them; its counters are 0.
void backward_split(const BackwardCall& call, const Problem& problem, const BackwardParams& params,
                    const BackwardConfig& config, int ordinal, CuStream stream);

// The variants that a release ships compiled, of those whose `main` it is.
std::vector<KernelConfig> backward_split_kernels(const BackwardConfig& main);

}  // namespace anymask::cuda
