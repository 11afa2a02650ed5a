// Gathers k and v into a plan's order of keys, and scatters dk and dv back.
#pragma once

#include <vector>

#include "anymask/types.hpp"
#include "cuda/kernel.h"
#include "rules/program.h"

namespace anymask::cuda {

enum class MoveKeys { gather, scatter };

// Copies all rows of `call` [batch, kv_len, kv_heads, depth] (16-bit elements; rows on 16 bytes)
// into the contiguous `ordered` of the same shape, or back. `program` has a key order.
void move_keys(MoveKeys direction, const Tensor& call, const Tensor& ordered,
               const rules::Program& program, int ordinal, CuStream stream);

std::vector<KernelConfig> move_keys_kernels();

}  // namespace anymask::cuda
