// Flash attention forward for Hopper (sm_90a): out = softmax(scale Q K^T under a mask) V.
// docs/kernels/forward.md has the reasons and the figures behind the choices.
#pragma once

#include "cuda/device/sm90/forward_math.h"
#include "cuda/device/sm90/row_roles.h"

namespace anymask::cuda {

template <ForwardConfig C>
__device__ __forceinline__ void forward_kernel(const ForwardParams& p) {
  static_assert(sizeof(ForwardShared<C>) <= C.shared_bytes());
  run_row_roles<C, ForwardShared<C>, MathWarp<C>>(p, blockIdx.x);
}

}  // namespace anymask::cuda
