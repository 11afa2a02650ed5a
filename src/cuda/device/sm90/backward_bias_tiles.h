// Biases of pairs in tiles, in the Hopper backward kernel for head dimensions up to 128: the copy
// engine brings them beside Q, and takes their gradients from the place where they lay.
//
// Read number by number (backward_pairs.h) they cost five times the rest of the pass: the caller's
// keys lie side by side, a thread's values belong to two keys and 16 queries. So each math warp has
// a piece of its own, 64 queries x 16 keys in rows of 32 bytes, whose 8 x 8 matrices come to
// registers and go back transposed. No two warps share one, so none waits for another.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/softmax.h"  // kMinusInfinity

namespace anymask::cuda {

// Where a step's biases, or their gradients, are in their map. `strides`: of the one or the other,
// 0 where one entry serves all heads or batch entries (of an expanded bias the gradient has more).
struct BiasPlace {
  int key, row, head, batch;

  template <typename Strides>
  __device__ __forceinline__ BiasPlace(const Strides& strides, int key_tile, int first_row,
                                       int of_head, int of_batch)
      : key(key_tile * 128),
        row(first_row),
        head(strides.head_stride != 0 ? of_head : 0),
        batch(strides.batch_stride != 0 ? of_batch : 0) {}
};

// By one lane of the loading warp; its bytes are among those that `full` expects.
template <BackwardConfig C>
__device__ __forceinline__ void load_bias_tile(const BackwardParams& p, BackwardShared<C>& shared,
                                               int stage, const BiasPlace& at) {
#pragma unroll
  for (int piece = 0; piece < BackwardShared<C>::kBiasPieces; ++piece) {
    ptx::load_box(shared.biases[stage][piece], &p.bias_map, shared.q_full[stage],
                  at.key + kBiasPieceKeys * piece, at.row, at.head, at.batch);
  }
}

// A math warp's piece of a step. Values are counted as in backward_elements.h.
template <BackwardConfig C>
struct BiasPiece {
  static constexpr bool kHalf = C.half != 0;
  const BackwardParams& p;
  BackwardShared<C>& shared;
  const int stage;
  const int key;  // in the tile, of this thread's first; the other is 8 further
  const int lane;

  // This lane's row of matrices for queries 8k .. 8k + 15: 256 bytes a k. Under the 32-byte swizzle
  // the halves of a row change places in every other four rows.
  __device__ __forceinline__ uint32_t address(int k) const {
    const uint32_t half = (lane >> 3 ^ lane >> 2) & 1;
    return ptx::shared_address(shared.biases[stage][key / kBiasPieceKeys]) + 256 * (lane >> 4) +
           32 * (lane & 7) + 16 * half + 256 * k;
  }

  // What is added to the scores of each of this thread's two keys: -infinity to those of a key that
  // does not exist, however small lse is.
  __device__ __forceinline__ void find_floor(float (&floor)[2]) const {
    const int position = ptx::uniform(shared.step_places[stage].key_tile) * C.columns() + key;
#pragma unroll
    for (int r = 0; r < 2; ++r) floor[r] = position + 8 * r < p.kv_len ? 0.0f : kMinusInfinity;
  }

  // Adds the biases of blocks k and k + 1 of this thread's pairs, as exp2 takes them.
  __device__ __forceinline__ void add(int k, const float (&floor)[2], float (&to)[8]) const {
    constexpr float kLog2E = 1.4426950408889634f;
    uint32_t words[4];
    ptx::load_matrices_transposed(address(k), words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = words[i / 2];
      const float bias = i % 2 == 0 ? ptx::low_of<kHalf>(word) : ptx::high_of<kHalf>(word);
      to[i] += __fmaf_rn(bias, kLog2E, floor[i / 2 % 2]);
    }
  }

  // The logits' gradients of the same blocks.
  __device__ __forceinline__ void give(int k, const float* values) const {
    if (p.bias_grad.data == nullptr) return;
    if (p.bias_grad.wide == 0) {
      ptx::store_matrices_transposed(address(k), pack_pair<kHalf>(values[0], values[1]),
                                     pack_pair<kHalf>(values[2], values[3]),
                                     pack_pair<kHalf>(values[4], values[5]),
                                     pack_pair<kHalf>(values[6], values[7]));
      return;
    }
    float* const to = sums() + 32 * 4 * k;
    ptx::add_four(to, values[0], values[1], values[2], values[3]);
    ptx::add_four(to + 32 * 4, values[4], values[5], values[6], values[7]);
  }

  // After the last of them.
  __device__ __forceinline__ void finish() const {
    if (p.bias_grad.data == nullptr || p.bias_grad.wide != 0) return;
    ptx::fence_async_shared();
    __syncwarp();
    if (lane == 0) {
      const BiasPlace at = place();
      const int piece = key / kBiasPieceKeys;
      ptx::store_box(&p.bias_grad_map, shared.biases[stage][piece], at.key + kBiasPieceKeys * piece,
                     at.row, at.head, at.batch);
      ptx::bulk_commit();
    }
  }

  // Before the stage is given back.
  static __device__ __forceinline__ void wait_for_copy(int lane) {
    if (lane == 0) ptx::bulk_wait_read<0>();
  }

 private:
  __device__ __forceinline__ BiasPlace place() const {
    const StepPlace& step = shared.step_places[stage];
    return BiasPlace(p.bias_grad, step.key_tile, shared.steps[stage].first_row, step.head,
                     step.batch);
  }

  // Of a shared bias: float32 sums in the order of accumulators (round_bias_tiles undoes it).
  // Launches see to it that no two blocks add to the same ones, and a thread comes to its own once
  // for each head of its group, so they have one order.
  __device__ __forceinline__ float* sums() const {
    const BiasPlace at = place();
    const int64_t tile = at.row / kBackwardRows * int64_t{p.columns.outer_tiles} + at.key / 128;
    return static_cast<float*>(p.bias_grad.data) + at.batch * p.bias_grad.batch_stride +
           at.head * p.bias_grad.head_stride + tile * kBiasTileSums +
           key / kBiasPieceKeys * (kBackwardRows * kBiasPieceKeys) + 4 * lane;
  }
};

}  // namespace anymask::cuda
