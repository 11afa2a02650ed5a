// The roles in a block that walks row tiles: to make the output, or dQ.
//
// A block has one producer warpgroup and C.warpgroups math warpgroups of 64 query rows. Warp 0 of
// the producer draws items (a row tile of a head) and loads; its other warps make mask bits; a math
// warpgroup keeps what it makes of scores in registers.
#pragma once

#include "cuda/device/sm90/forward_load.h"
#include "cuda/device/sm90/mask_bits.h"

namespace anymask::cuda {

// Shared: ForwardShared<C> or what is derived from it, as Params is from ForwardParams; Math: what
// a math warp does. first: the block's first item, or kDrawFirst.
template <ForwardConfig C, typename Shared, typename Math, typename Params>
__device__ __forceinline__ void run_row_roles(const Params& p, int first) {
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
      LoadWarp<C, Params, Shared> loader{p, shared, lane};
      loader.run(first);
    } else if (warp <= Shared::kFillWarps) {
      make_bits<C>(p, shared, warp - 1, lane);
    }
  } else {
    ptx::take_registers<C.math_registers>();
    Math math{p, shared, warp / kMathWarps - 1, warp % kMathWarps, lane};
    math.run();
  }
}

}  // namespace anymask::cuda
