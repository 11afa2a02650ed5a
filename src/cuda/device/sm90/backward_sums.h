// Where the parts of dQ that blocks make for different key tiles meet: sums in float32 in the
// workspace, in the order of the accumulators.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

// Waits until all key tiles that go before have added to this step's row tile of dQ.
__device__ __forceinline__ void await_turn(const int32_t* turns, const BackwardStep& step) {
  if (step.turn == 0) return;
  while (ptx::load_acquire(turns) < step.turn) __nanosleep(32);
}

// Adds a warpgroup's part of dQ from registers to the workspace; chained: when its turn has come,
// and the first one stores, so that nobody has to clear the sums before.
template <BackwardConfig C, int kCount>
__device__ __forceinline__ void add_in_turn(const BackwardParams& p, const BackwardStep& step,
                                            int part, int thread, const float (&values)[kCount]) {
  constexpr int kFloats = kBackwardRows * C.part_depth();
  float* to = p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
              part * kFloats + 4 * thread;
  int32_t* turns = p.turns + 2 * static_cast<int64_t>(step.row_tile) + part;
  if constexpr (C.chained != 0) {
    if (thread == 0) await_turn(turns, step);
    ptx::named_sync(kTurnBarrier + part, 128);
  }
  if (C.chained != 0 && step.turn == 0) {
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      *reinterpret_cast<float4*>(to + 512 * i) = {values[4 * i], values[4 * i + 1],
                                                  values[4 * i + 2], values[4 * i + 3]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      ptx::add_four(to + 512 * i, values[4 * i], values[4 * i + 1], values[4 * i + 2],
                    values[4 * i + 3]);
    }
  }
  if constexpr (C.chained != 0) {
    __threadfence();
    ptx::named_sync(kTurnBarrier + part, 128);
    if (thread == 0) ptx::add_release(turns, 1);
  }
}

// Chained: whoever is last takes the sum of those before and writes dQ itself.
template <BackwardConfig C, int kCount>
__device__ __forceinline__ void finish_in_turn(const BackwardParams& p, const BackwardStep& step,
                                               int batch, int part, int thread,
                                               float (&values)[kCount]) {
  constexpr int kFloats = kBackwardRows * C.part_depth();
  if (step.turn > 0) {
    const int32_t* turns = p.turns + 2 * static_cast<int64_t>(step.row_tile) + part;
    if (thread == 0) await_turn(turns, step);
    ptx::named_sync(kTurnBarrier + part, 128);
    const float* from = p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
                        part * kFloats + 4 * thread;
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      float before[4];
      ptx::load_four(from + 512 * i, before);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * i + j] += before[j];
    }
  }
  const int tile = step.row_tile - (batch * p.q_heads + step.last_head) * p.row_tiles;
  uint16_t* to = static_cast<uint16_t*>(p.q_grad) + batch * p.q_grad_batch_stride +
                 step.last_head * p.q_grad_head_stride + part * C.part_depth();
  store_rows<C.half != 0>(values, p.scale, to, p.q_grad_row_stride, nullptr, tile * kBackwardRows,
                          p.q_len, p.depth - part * C.part_depth(), thread / 32, thread % 32);
}

}  // namespace anymask::cuda
