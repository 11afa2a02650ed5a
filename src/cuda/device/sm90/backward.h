// Flash attention backward for Hopper (sm_90a), the main kernel: dK, dV and the sums of dQ.
//
// A block has one producer warpgroup, two math warpgroups, and one that makes dQ. It takes one key
// tile of one kv head at a time and walks the row tiles that the plan says it meets, over all query
// heads of the group; S and P are computed again. backward_prepare.h runs before it and
// backward_finish.h after it; or backward_split.h instead of it and of finish.
// docs/kernels/backward.md has the reasons and the figures behind the choices.
#pragma once

#include "cuda/device/sm90/backward_bits.h"
#include "cuda/device/sm90/backward_math.h"
#include "cuda/device/sm90/backward_produce.h"
#include "cuda/device/sm90/backward_query.h"
#include "cuda/device/sm90/backward_turns.h"
#include "cuda/device/sm90/backward_wide.h"

namespace anymask::cuda {

template <BackwardConfig C>
__device__ __forceinline__ void backward_kernel(const BackwardParams& p) {
  static_assert(sizeof(BackwardShared<C>) <= C.shared_bytes());
  if (p.splits()) return;
  extern __shared__ __align__(1024) uint8_t memory[];
  BackwardShared<C>& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.q);
    ptx::prefetch_map(&p.k);
    ptx::prefetch_map(&p.v);
    ptx::prefetch_map(&p.out_grad);
    shared.init();
    shared.chunk = chunk_of<C>(p);
  }
  init_units<C.half != 0>(shared.units, threadIdx.x, p.lse_exponent);
  __syncthreads();

  if (warp < kMathWarps) {
    ptx::give_registers<C.load_registers>();
    if (warp == 0) {
      backward_load<C>(p, shared, lane);
    } else if (warp < BackwardShared<C>::kFirstBitWarp) {
      if (lane == 0) TurnKeeper<C>{p, shared}.run();
    } else if constexpr (C.makes_bits()) {
      make_key_bits<C>(p, shared, warp - BackwardShared<C>::kFirstBitWarp, lane);
    }
    return;
  }
  const int w = warp / kMathWarps - 1;
  if (w < kBackwardWarpgroups) {
    ptx::take_registers<C.math_registers>();
    if constexpr (C.wide != 0) {
      BackwardWide<C> math{p, shared, w, warp % kMathWarps, lane};
      math.run();
    } else {
      BackwardMath<C> math{p, shared, w, warp % kMathWarps, lane};
      math.run();
    }
  } else if constexpr (C.has_query()) {
    ptx::give_registers<C.query_registers>();
    BackwardQuery<C> query{p, shared, warp % kMathWarps, lane};
    query.run();
  }
}

}  // namespace anymask::cuda
