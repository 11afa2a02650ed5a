// The list of kernels that a release ships compiled. A new kernel adds its own list here.
#include "cuda/kernel.h"
#include "cuda/plan.h"

namespace anymask::cuda {

std::vector<KernelConfig> registered_kernels() {
  std::vector<KernelConfig> all;
  const auto add = [&all](const std::vector<KernelConfig>& some) {
    all.insert(all.end(), some.begin(), some.end());
  };
  add(plan_kernels());
  return all;
}

}  // namespace anymask::cuda
