// What gather_keys is given: shared by the host that launches it and the device code.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

inline constexpr int kGatherThreads = 256;
inline constexpr int kMostTileColumns = 256;  // of any tile shape

// Strides in elements of two bytes: [batch, length, head].
struct GatherKeysParams {
  const void* from;          // rows in the caller's order
  void* to;                  // rows in the plan's order
  const int32_t* order;      // [order_batches][orders][length]: position -> key
  const int32_t* seen_keys;  // [order_batches][orders]: positions before have keys that rows see
  int64_t from_stride[3];
  int64_t to_stride[3];
  int64_t pieces;  // of 16 bytes, in all
  int32_t row_pieces;
  int32_t length;
  int32_t heads;
  int32_t order_batches;  // 1 or all
  int32_t orders;
  int32_t order_heads;  // kv heads that share an order
};

}  // namespace anymask::cuda
