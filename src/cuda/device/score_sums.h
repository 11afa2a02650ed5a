// After the backward kernel: gradients of score options from float32 sums, added in one order
// whatever the order of blocks was, and rounded to the caller's type.
#pragma once

#include "cuda/device/score_sums_params.h"
#include "cuda/device/scores.h"
#include "cuda/device/sm90/backward_config.h"

namespace anymask::cuda {

__device__ __forceinline__ void store_number(void* to, int64_t at, NumberForm form, float value) {
  if (form == NumberForm::kF32) {
    static_cast<float*>(to)[at] = value;
  } else {
    const uint32_t pair =
        form == NumberForm::kF16 ? ptx::pack_f16(value, 0.0f) : ptx::pack_bf16(value, 0.0f);
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(pair);
  }
}

// A thread for each element.
inline void sum_scores(const ScoreSumParams& p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= p.elements) return;
  const int64_t key = index % p.keys, row = index / p.keys % p.rows;
  const int64_t place = index / p.keys / p.rows;
  const int64_t head = place % p.to_heads, batch = place / p.to_heads;
  const int64_t from_heads = int64_t{p.to_heads} * p.shared_heads;
  float sum = 0.0f;
  if (p.from != nullptr) {
    for (int b = 0; b < p.shared_batches; ++b) {
      for (int h = 0; h < p.shared_heads; ++h) {
        const int64_t from_place =
            (batch * p.shared_batches + b) * from_heads + head * p.shared_heads + h;
        sum += p.from[(from_place * p.rows + row) * p.keys + key];
      }
    }
  }
  store_number(p.to,
               batch * p.to_batch_stride + head * p.to_head_stride + row * p.to_row_stride + key,
               p.form, sum);
}

// A block for a tile of kBackwardRows x 128 pairs of a bias, of whose sums each thread reads four
// at a time as they lie (backward_bias_tiles.h); rows leave side by side.
inline void round_bias_tiles(const BiasTileParams& p) {
  __shared__ float tile[kBackwardRows][128 + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t key_tiles = (p.keys + 127) / 128;
  const int64_t row_tiles = (p.rows + kBackwardRows - 1) / kBackwardRows;
  const int64_t index = blockIdx.x;
  const int64_t first_key = index % key_tiles * 128;
  const int64_t first_row = index / key_tiles % row_tiles * kBackwardRows;
  const int64_t place = index / key_tiles / row_tiles;
  const float4* const from = reinterpret_cast<const float4*>(p.from + index * kBiasTileSums);
#pragma unroll
  for (int i = 0; i < kBiasTileSums / 4 / kSumThreads; ++i) {
    const int at = i * kSumThreads + thread;
    const float4 four = from[at];
    const int lane = at % 32, query = at / 32 % 8 * 8 + lane % 4 * 2;
    const int key = at / 256 * kBiasPieceKeys + lane / 4;
    tile[query][key] = four.x;
    tile[query + 1][key] = four.y;
    tile[query][key + 8] = four.z;
    tile[query + 1][key + 8] = four.w;
  }
  __syncthreads();
  const int key = thread % 128;
  const int64_t to =
      place / p.to_heads * p.to_batch_stride + place % p.to_heads * p.to_head_stride + first_key;
  if (first_key + key >= p.keys) return;
  for (int row = thread / 128; row < kBackwardRows && first_row + row < p.rows; row += 2) {
    store_number(p.to, to + (first_row + row) * p.to_row_stride + key, p.form, tile[row][key]);
  }
}

// A block for each head. Rows that see nothing have an lse of +infinity.
inline void sum_sinks(const SinkSumParams& p) {
  __shared__ double warp_sums[kSinkThreads / 32];
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const float sink =
      p.form == NumberForm::kF16 ? sink_log2<true>(p.sink, head) : sink_log2<false>(p.sink, head);
  const int64_t rows = int64_t{p.row_tiles} * p.tile_rows;
  double sum = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const float* numbers = p.row_numbers + (b * p.heads + head) * rows * 2;
    for (int64_t row = thread; row < rows; row += kSinkThreads) {
      const float* lse = numbers + row / p.tile_rows * (2 * p.tile_rows) + row % p.tile_rows;
      sum -= static_cast<double>(ptx::exp2_fast(sink - lse[0]) * lse[p.tile_rows]);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  __syncthreads();
  if (thread != 0) return;
  sum = 0.0;
  for (const double& one : warp_sums) sum += one;
  store_number(p.to, head * p.to_stride, p.form, static_cast<float>(sum));
}

}  // namespace anymask::cuda
