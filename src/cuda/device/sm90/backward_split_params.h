// The variants and the parameter of the Hopper backward kernel that splits the work. Host and
// device.
#pragma once

#include "cuda/device/sm90/backward_config.h"
#include "cuda/device/sm90/forward_config.h"

namespace anymask::cuda {

struct SplitConfig {
  BackwardConfig keys;  // of those who make dK and dV
  ForwardConfig rows;   // of those who make dQ

  constexpr int shared_bytes() const {
    return rules::max_of(keys.shared_bytes(), rows.shared_bytes());
  }
};

// Of those who make dQ. Of the forward's, `map` is the plan's row map in the backward's tile
// shape, `scale_log2` has the scale's sign, and `out` and `lse` are not looked at.
struct RowPassParams : ForwardParams {
  TensorMapBytes out_grad;
  void* q_grad;
  int64_t q_grad_batch_stride, q_grad_row_stride, q_grad_head_stride;  // in elements
  const float* row_numbers;                                            // as BackwardParams has them
  float scale;
  int32_t depth;  // as given, not padded
};

struct SplitParams {
  BackwardParams keys;  // its `blocks` begin with dK and dV, and come first
  RowPassParams rows;   // and these begin with dQ
};

}  // namespace anymask::cuda
