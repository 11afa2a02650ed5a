// Flash attention backward for Hopper (sm_90a), dQ apart from dK and dV.
//
// S and P are computed once more than when a block makes all three as it walks a key tile. But no
// sum of dQ is ever in memory, all sums have one order, and a block has what its rows and its keys
// meet in common. docs/kernels/backward_split.md says when that is faster.
//
// A block has one producer warpgroup and two math warpgroups.
#pragma once

#include "cuda/device/sm90/backward_keys.h"
#include "cuda/device/sm90/backward_rows.h"
#include "cuda/device/sm90/backward_split_bits.h"
#include "cuda/device/sm90/backward_split_load.h"
#include "cuda/device/sm90/backward_split_stats.h"

namespace anymask::cuda {

template <SplitConfig C>
__device__ __forceinline__ void split_math(const SplitParams& p, SplitShared<C>& shared, int w,
                                           int warp, int lane) {
  SplitPlace<C> at{shared, w, warp, lane};
  Ring<C.rows().bit_slots> row_bits;
  Ring<C.keys().bit_slots> key_bits;
  int run_slot = -1;
#pragma unroll 1
  for (;;) {
    const SplitPhase phase = at.begin_phase();
    if (phase.work == SplitWork::kNone) break;
    if (phase.work == SplitWork::kRows) {
      RowPhase<C>{p, shared, at, row_bits}.run(phase);
    } else {
      KeyPhase<C>{p, shared, at, key_bits, run_slot}.run(phase);
    }
    at.end_phase();
  }
  if (lane == 0) ptx::bulk_wait<0>();
}

template <SplitConfig C>
__device__ __forceinline__ void backward_split_kernel(const SplitParams& p) {
  static_assert(sizeof(SplitShared<C>) <= C.shared_bytes());
  if (!p.keys.splits()) return;
  extern __shared__ __align__(1024) uint8_t memory[];
  SplitShared<C>& shared = *reinterpret_cast<SplitShared<C>*>(memory);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.keys.q);
    ptx::prefetch_map(&p.keys.out_grad);
    ptx::prefetch_map(&p.rows.k);
    ptx::prefetch_map(&p.rows.v);
    shared.init();
  }
  init_units<C.keys().half != 0>(shared.units, threadIdx.x, p.keys.lse_exponent);
  make_split_stats<C>(p, shared, warp, lane);
  __syncthreads();

  if (warp < kMathWarps) {
    ptx::give_registers<C.load_registers>();
    if (warp == 0) {
      SplitLoader<C>{p, shared, lane}.run();
    } else {
      make_split_bits<C>(p, shared, warp - 1, lane);
    }
  } else {
    ptx::take_registers<C.math_registers>();
    split_math<C>(p, shared, warp / kMathWarps - 1, warp % kMathWarps, lane);
  }
}

}  // namespace anymask::cuda
