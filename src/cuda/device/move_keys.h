// Copies rows of k, v, dk or dv between the caller's order of keys and the plan's. Memory bound: a
// thread moves 16 bytes, neighbouring threads move neighbours.
#pragma once

#include "cuda/device/move_keys_params.h"

namespace anymask::cuda {

inline void move_keys(const MoveKeysParams& params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMoveThreads + threadIdx.x;
  if (index >= params.pieces) return;
  const int piece = static_cast<int>(index % params.row_pieces);
  int64_t rest = index / params.row_pieces;
  const int head = static_cast<int>(rest % params.heads);
  rest /= params.heads;
  const int position = static_cast<int>(rest % params.length);
  const int batch = static_cast<int>(rest / params.length);
  const int64_t order =
      static_cast<int64_t>(params.order_batches == 1 ? 0 : batch) * params.orders +
      head / params.order_heads;
  const int key = params.order[order * params.length + position];
  const int64_t in_plan = batch * params.plan_stride[0] + position * params.plan_stride[1] +
                          head * params.plan_stride[2];
  const int64_t in_call =
      batch * params.call_stride[0] + key * params.call_stride[1] + head * params.call_stride[2];
  char* plan = static_cast<char*>(params.plan) + in_plan * 2 + piece * 16;
  char* call = static_cast<char*>(params.call) + in_call * 2 + piece * 16;
  if (params.to_plan) {
    *reinterpret_cast<uint4*>(plan) = *reinterpret_cast<const uint4*>(call);
  } else {
    *reinterpret_cast<uint4*>(call) = *reinterpret_cast<const uint4*>(plan);
  }
}

}  // namespace anymask::cuda
