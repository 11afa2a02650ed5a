// Flash attention forward for Hopper (sm_90a): out = softmax(scale Q K^T under a mask) V.
// docs/kernels/forward.md has the reasons and the figures behind the choices.
//
// A block has one producer warpgroup and C.warpgroups math warpgroups of 64 query rows; with halves
// two that have the same 16. Warp 0 of the producer draws items (a row tile of a head) and loads;
// its other warps make mask bits; a math warpgroup keeps what it makes of scores in registers.
#pragma once

#include "cuda/device/sm90/forward_load.h"
#include "cuda/device/sm90/forward_math.h"
#include "cuda/device/sm90/mask_bits.h"

namespace anymask::cuda {

template <ForwardConfig C>
__device__ __forceinline__ void forward_kernel(const ForwardParams& p) {
  using Shared = ForwardShared<C>;
  static_assert(sizeof(Shared) <= C.shared_bytes());
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.q);
    if (p.kv_len > 0) {  // else there are no maps of them
      ptx::prefetch_map(&p.k);
      ptx::prefetch_map(&p.v);
    }
    shared.init();
  }
  __syncthreads();

  if (warp < kMathWarps) {
    ptx::give_registers<C.load_registers>();
    if (warp == 0) {
      LoadWarp<C>{p, shared, lane}.run();
    } else if (warp <= Shared::kFillWarps) {
      make_bits<C>(p, shared, warp - 1, lane);
    }
  } else {
    ptx::take_registers<C.math_registers>();
    MathWarp<C>{p, shared, warp / kMathWarps - 1, warp % kMathWarps, lane}.run();
  }
}

}  // namespace anymask::cuda
