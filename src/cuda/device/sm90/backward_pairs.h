// Biases of pairs of a query and a key, and their gradients, in the Hopper backward kernels: read
// from and written to global memory by the math threads, each for its own pairs.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/sm90/softmax.h"  // kMinusInfinity

namespace anymask::cuda {

// A math thread's two keys, 8 positions apart.
template <BackwardConfig C>
struct ThreadKeys {
  int position;          // of the first, among all keys
  const int32_t* order;  // the caller's keys at positions, or null

  // `key`: in the step's tile.
  __device__ __forceinline__ void find(const BackwardParams& p, const StepPlace& place, int key) {
    position = ptx::uniform(place.key_tile) * C.columns() + key;
    order =
        key_order(p, {0, ptx::uniform(place.batch), ptx::uniform(place.head) / p.group_heads, 0});
  }

  __device__ __forceinline__ bool exists(const BackwardParams& p, int r) const {
    return position + 8 * r < p.kv_len;
  }

  // The caller's number of key r, which exists.
  __device__ __forceinline__ int64_t at(int r) const {
    return order != nullptr ? order[position + 8 * r] : position + 8 * r;
  }
};

// Of a step: 64 queries of a head. Block k of a thread's pairs, 0 to 7: queries 8k + 2q and 8k + 2q
// + 1, q = lane % 4, for its first key and then for its second.
template <BackwardConfig C>
struct PairTile {
  static constexpr bool kHalf = C.half != 0;
  ThreadKeys<C> keys;
  const void* biases;  // of the head's row and key 0
  char* gradients;     // likewise, or null
  int first_row;       // this lane's

  __device__ __forceinline__ void find(const BackwardParams& p, const BackwardShared<C>& shared,
                                       int stage, int key, int lane) {
    const StepPlace& place = shared.step_places[stage];
    keys.find(p, place, key);
    const int batch = ptx::uniform(place.batch), head = ptx::uniform(place.head);
    first_row = ptx::uniform(shared.steps[stage].first_row) + 2 * (lane % 4);
    biases = numbers_of(p.scores.bias, batch, head, 0);
    const BiasGradient& to = p.bias_grad;
    const int64_t offset = batch * to.batch_stride + head * to.head_stride;
    gradients = to.data == nullptr ? nullptr
                                   : static_cast<char*>(to.data) +
                                         offset * (to.form == BiasGradient::kHalf ? 2 : 4);
  }

  // Adds the biases of block k, as exp2 takes them.
  __device__ __forceinline__ void add_biases(const BackwardParams& p, int k, float (&to)[4]) const {
    constexpr float kLog2E = 1.4426950408889634f;
    const Numbers& numbers = p.scores.bias;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * k + i % 2;
      if (!keys.exists(p, i / 2)) {
        to[i] = kMinusInfinity;
      } else if (row < p.q_len) {
        const int64_t offset = row * numbers.row_stride + keys.at(i / 2) * numbers.key_stride;
        to[i] = __fmaf_rn(number_at<kHalf>(numbers, biases, offset), kLog2E, to[i]);
      }
    }
  }

  // Where a bias is shared, launches see to it that no two blocks have the same one, and a thread
  // comes to it once for each head of its group: so these sums have one order.
  __device__ __forceinline__ void give_gradients(const BackwardParams& p, int k,
                                                 const float* values) const {
    if (gradients == nullptr) return;
    const int form = p.bias_grad.form;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * k + i % 2;
      if (row >= p.q_len || !keys.exists(p, i / 2)) continue;
      const int64_t offset = row * p.bias_grad.row_stride + keys.at(i / 2);
      if (form == BiasGradient::kHalf) {
        reinterpret_cast<uint16_t*>(gradients)[offset] = static_cast<uint16_t>(
            kHalf ? ptx::pack_f16(values[i], 0.0f) : ptx::pack_bf16(values[i], 0.0f));
      } else if (form == BiasGradient::kSum) {
        ptx::add_one(reinterpret_cast<float*>(gradients) + offset, values[i]);
      } else {
        reinterpret_cast<float*>(gradients)[offset] = values[i];
      }
    }
  }
};

}  // namespace anymask::cuda
