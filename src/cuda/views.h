// Attention's tensors as the copy engine sees them.
#pragma once

#include "anymask/types.hpp"
#include "cuda/device/sm90/forward_config.h"

namespace anymask::cuda {

// Why the copy engine cannot read or write this view as it is (an address or stride that is no
// multiple of 16 bytes), or nullptr. Such a tensor has to be copied first.
const char* layout_problem(const Tensor& tensor);

// Throws InvalidValue with `name` for a view that has a layout_problem and elements.
void check_layout(const Tensor& tensor, const char* name);

// The tensor map of a [batch, length, heads, depth] view of 16-bit elements, for boxes of `rows`
// rows of 64 columns under the 128-byte swizzle, or of 16 under the 32-byte one. A view without
// elements gets an empty one: nothing is loaded from it.
TensorMapBytes tensor_map(const Tensor& tensor, int rows, int columns = 64);

// Shapes that q, k and v state.
Problem problem_of_views(const Tensor& q, const Tensor& k, const Tensor& v);

}  // namespace anymask::cuda
