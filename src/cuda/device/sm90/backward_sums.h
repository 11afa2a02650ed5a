// Where the parts of dQ that blocks make for different key tiles meet: sums in float32 in the
// workspace, in the order of the accumulators.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

// A warpgroup's way to the sums. Chained (backward_turns.h) the first in turn stores, the others
// add, and the last one takes what is there and writes dQ itself.
template <BackwardConfig C>
struct QuerySums {
  static constexpr int kFloats = kBackwardRows * C.part_depth();  // of a part

  const BackwardParams& p;
  const int thread;

  template <int kCount>
  __device__ __forceinline__ void add(const BackwardStep& step, int batch, int part,
                                      float (&values)[kCount]) const {
    if (C.has_turns() && step.last_head >= 0) return write(step, batch, part, values);
    float* to = sums_of(step, part);
    if (C.has_turns() && step.turn == 0) {  // so that nobody has to clear the sums before
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
  // opaque: two registers less around the loop. Without it chained variants with biases of pairs
  // keep two values in memory there, at head dimension 256 those of baked masks four.
  __device__ __forceinline__ float* sums_of(const BackwardStep& step, int part) const {
    return p.q_sums + static_cast<int64_t>(step.row_tile) * (kBackwardRows * C.depth) +
           part * kFloats + 4 * ptx::opaque(thread);
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
    uint16_t* to = static_cast<uint16_t*>(p.q_grad) + batch * p.q_grad_batch_stride +
                   step.last_head * p.q_grad_head_stride + part * C.part_depth();
    store_rows<C.half != 0>(values, p.scale, to, p.q_grad_row_stride, nullptr, step.first_row,
                            p.q_len, p.depth - part * C.part_depth(), thread / 32, thread % 32);
  }
};

}  // namespace anymask::cuda
