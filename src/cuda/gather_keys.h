// Gathers k and v into a plan's order of keys.
#pragma once

#include <vector>

#include "anymask/types.hpp"
#include "cuda/kernel.h"
#include "rules/program.h"

namespace anymask::cuda {

// Copies all rows of `from` [batch, kv_len, kv_heads, depth] (16-bit elements; rows on 16 bytes)
// into the contiguous `to` of the same shape. `program` has a key order.
void gather_keys(const Tensor& from, const Tensor& to, const rules::Program& program,
                 CuStream stream);

std::vector<KernelConfig> gather_keys_kernels();

}  // namespace anymask::cuda
