// dK and dV where a group's query heads are items of their own: added up in float32 in the
// workspace, in the order of the accumulators, and converted by a kernel after the main one.
//
// An item of all query heads of a group needs no sums, but blocks that work side by side are then
// at different heads, and Q, dO and dQ of all of them do not fit L2: causal, S = 8192, 32 query and
// 8 key heads, 15.0 ms on an H100, where 32 key heads take 9.0.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

inline constexpr int kSumKeys = 64;  // of a math warpgroup

// This thread's first float of the sums of 64 keys; `half`: which half of the key tile.
template <int kDepth>
__device__ __forceinline__ float* key_sums_at(const BackwardParams& p, float* sums, int batch,
                                              int kv_head, int key_tile, int half, int thread) {
  const int64_t tile =
      (static_cast<int64_t>(batch) * p.kv_heads + kv_head) * p.columns.outer_tiles + key_tile;
  return sums + (2 * tile + half) * (kSumKeys * kDepth) + 4 * thread;
}

template <int kDepth>
__device__ __forceinline__ void add_key_grads(float* to, const float (&grad)[kDepth / 2]) {
#pragma unroll
  for (int i = 0; i < kDepth / 8; ++i) {
    ptx::add_four(to + 512 * i, grad[4 * i], grad[4 * i + 1], grad[4 * i + 2], grad[4 * i + 3]);
  }
}

template <bool kHalf, int kDepth>
__device__ __forceinline__ void write_key_grads(const float* from, float scale, uint16_t* to,
                                                int64_t row_stride, const int32_t* order,
                                                int first_key, int keys, int depth, int thread) {
  float values[kDepth / 2];
#pragma unroll
  for (int i = 0; i < kDepth / 8; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(from + 512 * i);
    values[4 * i] = four.x;
    values[4 * i + 1] = four.y;
    values[4 * i + 2] = four.z;
    values[4 * i + 3] = four.w;
  }
  store_rows<kHalf>(values, scale, to, row_stride, order, first_key, keys, depth, thread / 32,
                    thread % 32);
}

// A block a key tile of a kv head, a warpgroup for each half of it.
template <BackwardConfig C>
__device__ __forceinline__ void backward_key_finish_kernel(const BackwardParams& p) {
  if (p.splits()) return;
  const int tiles = p.columns.outer_tiles;
  const int pair = blockIdx.x / tiles, key_tile = blockIdx.x - pair * tiles;
  const int batch = pair / p.kv_heads, kv_head = pair - batch * p.kv_heads;
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int32_t* order = key_order(p, {key_tile, batch, kv_head, 0, 0});
  const int first_key = (2 * key_tile + half) * kSumKeys;
  uint16_t* k_grad = static_cast<uint16_t*>(p.k_grad) + batch * p.k_grad_batch_stride +
                     kv_head * p.k_grad_head_stride;
  write_key_grads<C.half != 0, C.depth>(
      key_sums_at<C.depth>(p, p.k_sums, batch, kv_head, key_tile, half, thread), p.scale, k_grad,
      p.k_grad_row_stride, order, first_key, p.kv_len, p.depth, thread);
  uint16_t* v_grad = static_cast<uint16_t*>(p.v_grad) + batch * p.v_grad_batch_stride +
                     kv_head * p.v_grad_head_stride;
  write_key_grads<C.half != 0, C.value_depth>(
      key_sums_at<C.value_depth>(p, p.v_sums, batch, kv_head, key_tile, half, thread),
      p.scores.keep_scale, v_grad, p.v_grad_row_stride, order, first_key, p.kv_len, p.value_depth,
      thread);
}

}  // namespace anymask::cuda
