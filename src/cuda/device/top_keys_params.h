// What the kernels of top_keys are given: shared by the host that launches them and the device
// code.
#pragma once

#include "cuda/device/radix_sort_params.h"

namespace anymask::cuda {

// The sort: a block a tile of keys, four passes over 32 bits.
inline constexpr int kTileKeys = 4096;
inline constexpr int kSortPasses = 4;

// The walk: each warp takes a few chunks of neighbouring ranks.
inline constexpr int kChunkKeys = 256;
inline constexpr int kEndsWarps = 8;
inline constexpr int kEndsThreads = 32 * kEndsWarps;

struct TopKeysParams {
  const float* scores;
  int64_t batch_stride, head_stride, key_stride;  // of scores, in elements
  int32_t heads;
  int32_t kv_len;
  int32_t q_len;
  int32_t keep;  // at most kv_len

  // The sort. Items: [places][kv_len]; the first pass reads scores, the last writes order and rank.
  int32_t pass;
  int32_t tiles;  // of a place
  const uint64_t* from;
  uint64_t* to;
  int32_t* counts;  // [places][tiles][kDigits]
  int32_t* order;   // [places][kv_len]: the key of a rank
  int32_t* rank;    // [places][kv_len]: and back

  int64_t places;
  int32_t warps;        // of the walk, for each of them
  int32_t warp_chunks;  // for each warp
  int32_t* ends;        // [places][kv_len]
};

}  // namespace anymask::cuda
