#pragma once

#include "anymask/types.hpp"

namespace anymask::cpu {

// anymask::top_keys for checked arguments.
void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends);

}  // namespace anymask::cpu
