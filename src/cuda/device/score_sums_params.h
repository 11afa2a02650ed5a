// What the kernels that end the gradients of score options are given: host and device.
#pragma once

#include "cuda/device/score_params.h"

namespace anymask::cuda {

inline constexpr int kSumThreads = 256;
inline constexpr int kSinkThreads = 512;

// A gradient's type.
enum class NumberForm : int32_t { kBf16, kF16, kF32 };

// to[batch][head][row][key] = the sum of `from` over the batch entries and heads that share it.
struct ScoreSumParams {
  const float* from;  // [batches][heads][rows][keys], contiguous; null: zeros
  void* to;           // keys contiguous
  int64_t to_batch_stride, to_head_stride, to_row_stride;  // in elements
  int64_t rows, keys;
  int64_t elements;  // of `to`
  int32_t to_heads;
  int32_t shared_batches, shared_heads;  // how many of each `from` has for one of `to`
  NumberForm form;
};

// The same of a shared bias of pairs whose sums are in tiles, one for each of its entries.
struct BiasTileParams {
  const float* from;  // [batches][heads][row tiles][key tiles][kBiasTileSums]
  void* to;
  int64_t to_batch_stride, to_head_stride, to_row_stride;
  int64_t rows, keys;
  int32_t to_heads;
  NumberForm form;
};

// to[head] = the sum over batch entries and rows of -exp(sink - lse) (delta - dlse).
struct SinkSumParams {
  const float* row_numbers;  // [batch][heads][row_tiles][2][tile_rows]: lse log2(e), delta - dlse
  void* to;
  int64_t to_stride;
  Numbers sink;
  int64_t batch;
  int32_t heads;
  int32_t row_tiles;
  int32_t tile_rows;
  NumberForm form;  // of `to`, and where the sink is 16-bit its own
};

}  // namespace anymask::cuda
