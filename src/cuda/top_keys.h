// Dynamic masks selected on the device. Everything is queued on the caller's stream, writes only
// into the caller's memory, never waits for the device and can be captured in a graph.
#pragma once

#include <vector>

#include "anymask/types.hpp"
#include "cuda/device/top_keys_params.h"
#include "cuda/kernel.h"

namespace anymask::cuda {

// Scratch memory for scores [batch, heads, kv_len]: 16 bytes a key, and a little.
int64_t top_keys_workspace(const Tensor& scores);

// anymask::top_keys for checked arguments; `workspace`: top_keys_workspace bytes on the scores'
// device, aligned to 256.
void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends,
              void* workspace, CuStream stream);

// The launches that it makes, in order, for a device of that many multiprocessors. Apart for tests,
// which run the kernels on the CPU.
struct TopKeysStep {
  KernelConfig config;
  Grid grid;
  TopKeysParams params;
};
std::vector<TopKeysStep> top_keys_steps(const Tensor& scores, int64_t keep, int64_t q_len,
                                        const Tensor& ends, void* workspace, int multiprocessors);

std::vector<KernelConfig> top_keys_kernels();

}  // namespace anymask::cuda
