// The Hopper backward kernels' variants and their one parameter. Host and device.
#pragma once

#include "cuda/device/sm90/forward_config.h"  // TensorMapBytes, RunRecipe
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// Query rows of a tile: two words of mask bits a key, one 128-byte swizzled row of dS^T.
inline constexpr int kBackwardRows = 64;
inline constexpr int kBackwardWarpgroups = 2;

// One variant. Integers only: the launcher hands them to the compiler as a list.
struct BackwardConfig {
  int32_t half;         // 1: fp16, 0: bf16
  int32_t depth;        // head dimension of q and k, padded: 64, 128, 256
  int32_t value_depth;  // head dimension of v and out, padded likewise; wide: equal to depth
  int32_t wide;         // 0: a warpgroup owns 64 of 128 keys; 1: half of the depth of 64 keys
  int32_t k_stages;     // tiles of K: 2 where the next item's may come early
  int32_t q_stages;     // tiles of Q in shared memory
  int32_t o_stages;     // tiles of dO
  int32_t staged;       // dQ leaves 1: through shared memory, by the copy engine; 0: from registers
  int32_t chained;    // how the parts of a row tile of dQ meet. 0: added in any order to sums that
                      // one kernel clears and another converts. 1: in a fixed order; the first
                      // block stores, the last one converts
  int32_t bit_slots;  // partial tiles whose bits are in shared memory
  int32_t machine;    // 1: mask bits by the postfix machine, for programs without a recipe
  int32_t slope_operand;  // A of dK = dS^T Q comes 0: from registers; 1: from shared memory
  int32_t late_scores;    // the next S is issued 0: before dQ and dK; 1: after them
  int32_t math_registers;
  int32_t load_registers;

  constexpr int rows() const { return kBackwardRows; }
  constexpr int columns() const { return wide != 0 ? 64 : 128; }
  constexpr int threads() const { return 128 * (kBackwardWarpgroups + 1); }
  // The part of D (of dQ; wide: of dK and dV too) that belongs to one warpgroup.
  constexpr int part_depth() const { return depth / kBackwardWarpgroups; }
  // K, V, the rings of Q and dO, dS (wide: and P), what is staged of dQ, the rings of statistics
  // and mask bits, the keys' runs, and 2 KiB for barriers, alignment and the like.
  constexpr int shared_bytes() const {
    const int keys = columns();
    return (keys * k_stages + kBackwardRows * q_stages) * depth * 2 +
           (keys + kBackwardRows * o_stages) * value_depth * 2 +
           (wide != 0 ? 2 : 1) * keys * kBackwardRows * 2 +
           (staged != 0 ? kBackwardRows * depth * 4 : 0) + q_stages * kBackwardRows * 8 +
           bit_slots * keys * 8 + (machine != 0 ? 0 : keys * 24) + 2048;
  }
};

// Everything that the three kernels of a backward pass read. Strides are in elements, and the last
// dimension is contiguous.
struct BackwardParams {
  TensorMapBytes q;  // dimensions: depth, length, heads, batch
  TensorMapBytes k;
  TensorMapBytes v;
  TensorMapBytes out_grad;

  const void* out;
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  const void* grad;  // of out, as the map out_grad has it
  int64_t grad_batch_stride, grad_row_stride, grad_head_stride;
  const float* lse;       // [batch][q_heads][q_len], natural log
  const float* lse_grad;  // likewise, or null

  void* q_grad;
  int64_t q_grad_batch_stride, q_grad_row_stride, q_grad_head_stride;
  void* k_grad;
  int64_t k_grad_batch_stride, k_grad_row_stride, k_grad_head_stride;
  void* v_grad;
  int64_t v_grad_batch_stride, v_grad_row_stride, v_grad_head_stride;

  // Workspace, linear in q_len. A row tile is (batch * q_heads + head) * row_tiles + tile.
  float* q_sums;  // [row tile][64 * depth]: dQ / scale, in the order of the accumulators
  float* stats;   // [row tile][2][64]: lse in log2 units, and row sums; see stat_index
  // [row tile][2], chained: how many key tiles have added their part, a count for each warpgroup
  // (staged: the first counts both).
  int32_t* turns;
  int32_t* next_item;

  int32_t batch;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t group_heads;  // query heads per kv head
  int32_t q_len;
  int32_t kv_len;
  int32_t depth;  // as given, not padded
  int32_t value_depth;
  float scale;
  float scale_log2;  // scale * log2(e)

  int32_t row_tiles;
  int32_t pairs;  // batch * kv_heads: (batch, kv head) pairs, heads innermost
  int32_t chunk;  // pairs that run together, so that their Q, dO and dQ stay in L2
  int32_t items;  // pairs * key tiles

  plan::TileMap columns;  // outer: key tiles
  plan::TileMap rows;     // outer: row tiles; chained only
  RunRecipe recipe;
  rules::Program program;
};

// Where row `row` of a tile lies in each of its 64 floats of statistics. A thread of quad lane q
// needs those of rows 8k + 2q and 8k + 2q + 1: four times four neighbours.
constexpr int stat_index(int row) {
  const int k = row / 8, q = row % 8 / 2;
  return (k / 2 * 4 + q) * 4 + k % 2 * 2 + row % 2;
}

}  // namespace anymask::cuda
