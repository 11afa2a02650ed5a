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

// A step's pairs. Block k of a thread's pairs, 0 to 7: queries 8k + 2q and 8k + 2q + 1, q = lane %
// 4, with its first key and then with its second.
//
// Each pair's address is worked out by itself, and each block of pairs has branches of its own:
// what the compiler shares or moves between blocks takes registers that are not there.
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
                                   : static_cast<char*>(to.data) + offset * (to.wide != 0 ? 4 : 2);
  }

  // Adds the biases of block k, as exp2 takes them. Pairs of keys that do not exist get -infinity.
  __device__ __forceinline__ void add_biases(const BackwardParams& p, int k, float* to) const {
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
  // comes to it once for each head of its group: so float32 sums have one order.
  __device__ __forceinline__ void give_gradients(const BackwardParams& p, int k,
                                                 const float* values) const {
    if (gradients == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * k + i % 2;
      if (row >= p.q_len || !keys.exists(p, i / 2)) continue;
      const int64_t offset = row * p.bias_grad.row_stride + keys.at(i / 2);
      if (p.bias_grad.wide == 0) {
        reinterpret_cast<uint16_t*>(gradients)[offset] = static_cast<uint16_t>(
            kHalf ? ptx::pack_f16(values[i], 0.0f) : ptx::pack_bf16(values[i], 0.0f));
      } else {
        ptx::add_one(reinterpret_cast<float*>(gradients) + offset, values[i]);
      }
    }
  }
};

}  // namespace anymask::cuda
