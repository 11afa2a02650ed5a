// Gathers k and v into a plan's order of keys.
#pragma once

#include <vector>

#include "anymask/types.hpp"
#include "cuda/kernel.h"
#include "plan/view.h"

namespace anymask::cuda {

// Copies rows of `from` [batch, kv_len, kv_heads, depth] (16-bit elements; rows on 16 bytes) into
// the contiguous `to` of the same shape: those of all tiles that hold a key that some row sees.
// `plan` has a key order.
void gather_keys(const Tensor& from, const Tensor& to, const plan::Plan& plan, CuStream stream);

std::vector<KernelConfig> gather_keys_kernels();

}  // namespace anymask::cuda
