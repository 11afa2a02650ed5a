// Copies rows of k or v from the caller's order of keys into the plan's. Memory bound: a thread
// moves 16 bytes, neighbouring threads move neighbours. Positions behind the last tile with a key
// that some row sees are never read and stay as they are: of the best 1024 of 32768 keys 86%.
#pragma once

#include "cuda/device/gather_keys_params.h"

namespace anymask::cuda {

inline void gather_keys(const GatherKeysParams& params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
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
  if (position - kMostTileColumns >= params.seen_keys[order]) return;
  const int key = params.order[order * params.length + position];
  const int64_t source =
      batch * params.from_stride[0] + key * params.from_stride[1] + head * params.from_stride[2];
  const int64_t target =
      batch * params.to_stride[0] + position * params.to_stride[1] + head * params.to_stride[2];
  const char* from = static_cast<const char*>(params.from) + source * 2 + piece * 16;
  char* to = static_cast<char*>(params.to) + target * 2 + piece * 16;
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

}  // namespace anymask::cuda
