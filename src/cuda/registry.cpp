// The list of kernels that a release ships compiled. A new kernel adds its own list here.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/gather_keys.h"
#include "cuda/kernel.h"
#include "cuda/plan.h"
#include "cuda/score_gradients.h"
#include "cuda/top_keys.h"

namespace anymask::cuda {

std::vector<KernelConfig> registered_kernels() {
  std::vector<KernelConfig> all;
  for (const auto& list : {plan_kernels(), top_keys_kernels(), gather_keys_kernels(),
                           forward_kernels(), backward_kernels(), score_sum_kernels()})
    all.insert(all.end(), list.begin(), list.end());
  return all;
}

void for_each_kernel(const std::function<void(const KernelConfig&)>& action) {
  const std::vector<KernelConfig> all = registered_kernels();
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    for (size_t i = next++; i < all.size(); i = next++) {
      try {
        action(all[i]);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  for (size_t i = 1; i < std::min(cores, all.size()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

int warm_up(int capability) {
  std::atomic<int> count{0};
  for_each_kernel([&](const KernelConfig& config) {
    const int wanted = config.family->capability;
    if (wanted != 0 && wanted != capability) return;
    kernel_code(config, capability);
    ++count;
  });
  return count;
}

}  // namespace anymask::cuda
