// Where a row tile's key tiles are with several blocks (PartList in schedule.h): a math warp leaves
// what it has made of its part in the workspace, and whoever comes last joins the parts.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/forward_store.h"

namespace anymask::cuda {

// Numbered barriers of calls of few rows.
inline constexpr int kHalfEmptyBarrier = 1;
inline constexpr int kHalfFullBarrier = 2;
inline constexpr int kPartsBarrier = 3;

// Takes another part of the keys in, whose maxima and sums `state` has: what the output so far and
// that part's are to be multiplied by.
__device__ __forceinline__ void add_state(RowState& rows, const float (&state)[4],
                                          float (&before)[2], float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(rows.top[r], state[r]);
    before[r] = ptx::exp2_fast(rows.top[r] - top);
    factor[r] = ptx::exp2_fast(state[r] - top);
    rows.top[r] = top;
    rows.sum[r] = rows.sum[r] * before[r] + state[2 + r] * factor[r];
  }
}

// Four numbers of it: two of each row.
__device__ __forceinline__ void add_four(const float (&values)[4], const float (&before)[2],
                                         const float (&factor)[2], float* to) {
#pragma unroll
  for (int n = 0; n < 4; ++n) to[n] = to[n] * before[n / 2] + values[n] * factor[n / 2];
}

// A lane's output, 16 bytes a place, then its rows' state.
template <int kCount, typename Place>
__device__ __forceinline__ void put_down(const RowState& rows, const float (&out)[kCount],
                                         Place&& place) {
  const auto put = [&](int i, float4 four) { *reinterpret_cast<float4*>(place(i)) = four; };
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    put(i, {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]});
  }
  put(kCount / 4, {rows.top[0], rows.top[1], rows.sum[0], rows.sum[1]});
}

// A strip of 16 rows: their state and their output so far, which a lane of a warp has 16 bytes at
// a time.
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
    put_down(rows, out, [&](int i) { return place(part.index, i); });
  }

  __device__ __forceinline__ int32_t* arrived() const {
    return p.arrived + part.row_tile * C.joined_strips() + strip;
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

  // Parts are added in their order, so that results do not tell who joins them.
  __device__ __forceinline__ RowState nothing() const {
    RowState rows;
    rows.reset();
    if constexpr (C.has(kBounded)) rows.top[0] = rows.top[1] = 0.0f;
    return rows;
  }

  // Makes rows and out, now of this block's part, those of all.
  __device__ __forceinline__ void join(RowState& rows, float (&out)[C.value_depth / 2]) const {
    RowState all = nothing();
    float joined[C.value_depth / 2] = {};
#pragma unroll 1
    for (int index = 0; index < part.parts; ++index) {
      float state[4] = {rows.top[0], rows.top[1], rows.sum[0], rows.sum[1]};
      const bool mine = index == part.index;
      if (!mine) ptx::load_four(place(index, kOutput), state);
      float before[2], factor[2];
      add_state(all, state, before, factor);
#pragma unroll
      for (int i = 0; i < kOutput; ++i) {
        float values[4] = {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
        if (!mine) ptx::load_four(place(index, i), values);
        add_four(values, before, factor, &joined[4 * i]);
      }
    }
    rows = all;
#pragma unroll
    for (int i = 0; i < C.value_depth / 2; ++i) out[i] = joined[i];
  }

  // Whether rows and out are now those of all parts: to whoever comes last.
  //
  // With halves, which is decoding, there are 16 to 132 parts: a trip to memory for each, one after
  // the other, took 9 to 70 us. So they are joined when the block has no more items, by all math
  // warps; there is a note of it. Between items there are no registers for that.
  __device__ __forceinline__ bool run(ForwardShared<C>& shared, const Item& item, RowState& rows,
                                      float (&out)[C.value_depth / 2]) const {
    if (C.halves != 0 || !others_there()) {
      leave(rows, out);
      if (!is_last()) return false;
    }
    if constexpr (C.halves != 0) {
      if (lane != 0) return false;
      const int at = shared.joins;
      shared.join_items[at] = item;
      shared.join_parts[at] = part;
      shared.joins = at + 1;
      return false;
    } else {
      join(rows, out);
      return true;
    }
  }

  // What warp `warp` of a warpgroup does then: 32 columns, eight parts at a time.
  __device__ __forceinline__ void join_at_end(const Item& item, int warp) const {
    constexpr int kAtOnce = 8, kFours = 4;
    const int first_column = 32 * warp;
    if (first_column >= C.value_depth) return;
    RowState all = nothing();
    float joined[4 * kFours] = {};
#pragma unroll 1
    for (int begin = 0; begin < part.parts; begin += kAtOnce) {
      float state[kAtOnce][4], values[kAtOnce][kFours][4];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int index = rules::min_of(begin + n, part.parts - 1);
        ptx::load_four(place(index, kOutput), state[n]);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          ptx::load_four(place(index, first_column / 8 + i), values[n][i]);
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        // Under a branch the loads would come one part after the other.
        const bool exists = begin + n < part.parts;
#pragma unroll
        for (int r = 0; r < 2; ++r) state[n][r] = exists ? state[n][r] : kNothing;
        float before[2], factor[2];
        add_state(all, state[n], before, factor);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          add_four(values[n][i], before, factor, &joined[4 * i]);
        }
      }
    }
    store_output<C>(p, item, lane / 4, lane % 4, all, joined, first_column);
  }
};

// By all math warps: of row tiles of which the block has brought the last part, each warpgroup
// joins every other.
template <ForwardConfig C>
__device__ __forceinline__ void join_at_end(const ForwardParams& p, ForwardShared<C>& shared, int w,
                                            int warp, int lane) {
  ptx::named_sync(kPartsBarrier, 32 * kMathWarps * C.warpgroups);
#pragma unroll 1
  for (int i = w; i < shared.joins; i += C.warpgroups) {
    const RowPart part = shared.join_parts[i];
    PartJoin<C>{p, part, 0, lane}.join_at_end(shared.join_items[i], warp);
  }
}

// The two halves of a strip of 16 rows, of which warp 0 of each warpgroup has one: the second hands
// its own over. Whether rows and out are now those of both.
template <ForwardConfig C>
__device__ __forceinline__ bool join_halves(ForwardShared<C>& shared, int w, int lane,
                                            RowState& rows, float (&out)[C.value_depth / 2]) {
  constexpr int kOutput = C.value_depth / 8;
  const auto place = [&](int i) { return shared.half[i][lane]; };
  if (w == 1) {
    ptx::named_sync(kHalfEmptyBarrier, 64);
    put_down(rows, out, place);
    ptx::named_arrive(kHalfFullBarrier, 64);
    return false;
  }
  ptx::named_sync(kHalfFullBarrier, 64);
  const auto take = [&](int i, float(&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(place(i));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  };
  float state[4], before[2], factor[2];
  take(kOutput, state);
  add_state(rows, state, before, factor);
#pragma unroll
  for (int i = 0; i < kOutput; ++i) {
    float values[4];
    take(i, values);
    add_four(values, before, factor, &out[4 * i]);
  }
  ptx::named_arrive(kHalfEmptyBarrier, 64);
  return true;
}

}  // namespace anymask::cuda
