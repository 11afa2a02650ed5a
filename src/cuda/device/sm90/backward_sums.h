// Where the parts of dQ that blocks make for different key tiles meet: sums in float32 in the
// workspace, in the order of the accumulators.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

__device__ __forceinline__ void await_turn(const int32_t* turns, int turn) {
  while (ptx::load_acquire(turns) < turn) __nanosleep(20);
}

// A warpgroup's way to the sums. Chained: a step waits for its turn, adds and passes the turn on,
// and the last in turn takes what is there and writes dQ itself.
//
// Passing on means to wait until what was added is there for all blocks, half a step's time. So a
// turn is passed on when the next one is about to be taken: by then nothing is left to wait for.
template <BackwardConfig C>
struct QuerySums {
  static constexpr int kFloats = kBackwardRows * C.part_depth();  // of a part

  const BackwardParams& p;
  const int first_part;  // that this warpgroup makes
  const int thread;
  int owed = -1;  // the row tile whose turn is still to be passed on

  // Until the step's turn has come.
  __device__ __forceinline__ void await(const BackwardStep& step) const {
    if (C.chained == 0 || step.turn == 0) return;
    if (thread == 0) await_turn(turns_of(step.row_tile), step.turn);
    ptx::named_sync(kTurnBarrier + first_part, 128);
  }

  __device__ __forceinline__ void finish(const BackwardStep& step) {
    if constexpr (C.chained == 0) return;
    if (step.last_head < 0) owed = step.row_tile;
  }

  // At the end of an item too, where the next step may be far.
  __device__ __forceinline__ void settle() {
    if (C.chained == 0 || owed < 0) return;
    __threadfence();
    ptx::named_sync(kTurnBarrier + first_part, 128);
    if (thread == 0) ptx::add_release(turns_of(owed), 1);
    owed = -1;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const BackwardStep& step, int batch, int part,
                                      float (&values)[kCount]) const {
    if (C.chained != 0 && step.last_head >= 0) return write(step, batch, part, values);
    float* to = sums_of(step, part);
    if (C.chained != 0 && step.turn == 0) {  // so that nobody has to clear the sums before
#pragma unroll
      for (int i = 0; i < kFloats / 512; ++i) {
        *reinterpret_cast<float4*>(to + 512 * i) = {values[4 * i], values[4 * i + 1],
                                                    values[4 * i + 2], values[4 * i + 3]};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kFloats / 512; ++i) {
      ptx::add_four(to + 512 * i, values[4 * i], values[4 * i + 1], values[4 * i + 2],
                    values[4 * i + 3]);
    }
  }

 private:
  __device__ __forceinline__ int32_t* turns_of(int row_tile) const {
    return p.turns + 2 * static_cast<int64_t>(row_tile) + first_part;
  }

  __device__ __forceinline__ float* sums_of(const BackwardStep& step, int part) const {
    return p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
           part * kFloats + 4 * thread;
  }

  template <int kCount>
  __device__ __forceinline__ void write(const BackwardStep& step, int batch, int part,
                                        float (&values)[kCount]) const {
    if (step.turn > 0) {
      const float* from = sums_of(step, part);
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
};

}  // namespace anymask::cuda
