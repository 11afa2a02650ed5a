// Where a row tile's key tiles are with several blocks (PartList in schedule.h): a math warp leaves
// what it has made of its part in the workspace, and whoever comes last joins the parts.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/forward_shared.h"
#include "cuda/device/sm90/softmax.h"

namespace anymask::cuda {

// A warp's 16 rows: their state and their output so far, which a lane has 16 bytes at a time.
template <ForwardConfig C>
struct PartJoin {
  static constexpr int kOutput = C.value_depth / 8;  // of a lane, in 16 bytes

  const ForwardParams& p;
  const RowPart& part;
  const int strip;  // of 16 rows
  const int lane;

  // A block has two places: for a row tile's first part, which its last item may be, and for
  // another, which its first may.
  __device__ __forceinline__ float* place(int index, int at) const {
    const int slot = 2 * (part.first_block + index) + (index == 0 ? 1 : 0);
    return p.parts + static_cast<int64_t>(slot) * p.part_floats +
           ((strip * (kOutput + 1) + at) * 32 + lane) * 4;
  }

  __device__ __forceinline__ void leave(const RowState& rows,
                                        const float (&out)[C.value_depth / 2]) const {
#pragma unroll
    for (int i = 0; i < kOutput; ++i) {
      *reinterpret_cast<float4*>(place(part.index, i)) = {out[4 * i], out[4 * i + 1],
                                                          out[4 * i + 2], out[4 * i + 3]};
    }
    *reinterpret_cast<float4*>(place(part.index, kOutput)) = {rows.top[0], rows.top[1], rows.sum[0],
                                                              rows.sum[1]};
  }

  __device__ __forceinline__ int32_t* arrived() const {
    return p.arrived + part.row_tile * (C.rows() / 16) + strip;
  }

  // Whether all other parts are there. A row tile's first part is its block's last, the others are
  // the first of theirs: so where there are two, it mostly finds the other one.
  __device__ __forceinline__ bool others_there() const {
    if (part.index != 0) return false;
    int there = 0;
    if (lane == 0) there = ptx::load_acquire(arrived());
    return __shfl_sync(0xffffffffu, there, 0) + 1 == part.parts;
  }

  // Of one that has left its part.
  __device__ __forceinline__ bool is_last() const {
    __syncwarp();
    int before = 0;
    if (lane == 0) {
      ptx::fence_gpu();
      before = atomicAdd(arrived(), 1);
      ptx::fence_gpu();
    }
    return __shfl_sync(0xffffffffu, before, 0) + 1 == part.parts;
  }

  // Whether rows and out are now those of all parts: to whoever comes last. Parts are added in
  // their order, so that results do not tell who that was.
  __device__ __forceinline__ bool run(RowState& rows, float (&out)[C.value_depth / 2]) const {
    if (!others_there()) {
      leave(rows, out);
      if (!is_last()) return false;
    }
    RowState all;
    all.reset();
    if constexpr (C.has(kBounded)) all.top[0] = all.top[1] = 0.0f;
    float joined[C.value_depth / 2];
#pragma unroll
    for (int i = 0; i < C.value_depth / 2; ++i) joined[i] = 0.0f;
#pragma unroll 1
    for (int index = 0; index < part.parts; ++index) {
      float state[4] = {rows.top[0], rows.top[1], rows.sum[0], rows.sum[1]};
      const bool mine = index == part.index;
      if (!mine) ptx::load_four(place(index, kOutput), state);
      float before[2], factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float top = fmaxf(all.top[r], state[r]);
        before[r] = ptx::exp2_fast(all.top[r] - top);
        factor[r] = ptx::exp2_fast(state[r] - top);
        all.top[r] = top;
        all.sum[r] = all.sum[r] * before[r] + state[2 + r] * factor[r];
      }
#pragma unroll
      for (int i = 0; i < kOutput; ++i) {
        float values[4] = {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
        if (!mine) ptx::load_four(place(index, i), values);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float& sum = joined[4 * i + n];
          sum = sum * before[n / 2] + values[n] * factor[n / 2];
        }
      }
    }
    rows = all;
#pragma unroll
    for (int i = 0; i < C.value_depth / 2; ++i) out[i] = joined[i];
    return true;
  }
};

}  // namespace anymask::cuda
