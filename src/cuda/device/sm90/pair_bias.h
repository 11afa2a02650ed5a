// Biases of pairs of a query and a key, read by the math threads of the forward kernel.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/schedule.h"
#include "cuda/device/sm90/softmax.h"  // transpose_quad

namespace anymask::cuda {

// What a thread reads for its two rows of an item. kTiles: of kBiasTiles.
template <bool kHalf, bool kTiles>
struct PairBias {
  const void* rows[2];   // where the number of key 0 is
  const int32_t* order;  // the keys at positions, or null

  // first_row: of the thread's two, 8 apart.
  __device__ __forceinline__ void start_item(const ForwardParams& p, const Item& item,
                                             int first_row) {
    order = key_order_of(p.program, mask_place(p, item.batch, item.head));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = rules::min_of(first_row + 8 * r, p.q_len - 1);
      rows[r] = numbers_of(p.scores.bias, item.batch, item.head, row);
    }
  }

  // The numbers of accumulators: i is of row i / 2 % 2 and position 8 (i / 4) + i % 2 from
  // `position` on; 0 beyond the last key.
  template <int kCount>
  __device__ __forceinline__ void read(const ForwardParams& p, int position,
                                       float (&to)[kCount]) const {
    const int left = p.kv_len - position;
    if constexpr (kTiles) {
      read_eights(left, position, to);
    } else if (p.scores.bias_at_once == 1) {
      const Numbers& bias = p.scores.bias;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int at = 8 * (i / 4) + i % 2;
        to[i] = 0.0f;
        if (at >= left) continue;
        const int64_t key = order != nullptr ? order[position + at] : position + at;
        to[i] = number_at<kHalf>(bias, rows[i / 2 % 2], key * bias.key_stride);
      }
    } else if (p.scores.bias.wide != 0) {
      read_pairs<float2>(left, position, to, [](const float2& pair, float* both) {
        both[0] = pair.x;
        both[1] = pair.y;
      });
    } else {
      read_pairs<uint32_t>(left, position, to, Halves{});
    }
  }

  // Of four blocks of 8 keys a lane reads one, and the quad deals them out: with a load for each
  // pair of keys the first-level cache, which takes a row of addresses at a time, is what a tile
  // waits for. kCount / 4 % 4 blocks at the end are read in pairs.
  template <int kCount>
  __device__ __forceinline__ void read_eights(int left, int position, float (&to)[kCount]) const {
    const int q = static_cast<int>(threadIdx.x) % 4;
    constexpr int kBlocks = kCount / 4;
#pragma unroll
    for (int block = 0; block + 4 <= kBlocks; block += 4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 8 * (block + q) - 2 * q;  // from `position`, which is of key 2q of a block
        uint4 eight{};
        if (at < left) {
          eight = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(rows[r]) +
                                                  (position + at));
        }
        uint32_t pieces[4] = {eight.x, eight.y, eight.z, eight.w};
        transpose_quad(pieces, q);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[4 * (block + i) + 2 * r] = ptx::low_of<kHalf>(pieces[i]);
          to[4 * (block + i) + 2 * r + 1] = ptx::high_of<kHalf>(pieces[i]);
        }
      }
    }
    constexpr int kRest = kBlocks % 4;
    if constexpr (kRest != 0) {
      constexpr int kFirst = kBlocks - kRest;
      float rest[4 * kRest];
      read_pairs<uint32_t>(left - 8 * kFirst, position + 8 * kFirst, rest, Halves{});
#pragma unroll
      for (int i = 0; i < 4 * kRest; ++i) to[4 * kFirst + i] = rest[i];
    }
  }

  struct Halves {
    __device__ __forceinline__ void operator()(uint32_t pair, float* both) const {
      both[0] = ptx::low_of<kHalf>(pair);
      both[1] = ptx::high_of<kHalf>(pair);
    }
  };

  template <typename Pair, int kCount, typename Unpack>
  __device__ __forceinline__ void read_pairs(int left, int position, float (&to)[kCount],
                                             const Unpack& unpack) const {
    const Pair* const first[2] = {static_cast<const Pair*>(rows[0]) + (position >> 1),
                                  static_cast<const Pair*>(rows[1]) + (position >> 1)};
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const int at = 8 * (i / 4);
      Pair pair{};
      if (at < left) pair = first[i / 2 % 2][at / 2];
      unpack(pair, &to[i]);
    }
  }

  // Sets the scores to the biases, all read at once; or (kAdd) adds them, a few at a time: beside
  // the scores there is no room for more.
  template <bool kAdd, int kCount>
  __device__ __forceinline__ void give(const ForwardParams& p, int position,
                                       float (&scores)[kCount]) const {
    constexpr int kAtOnce = !kAdd ? kCount : kCount % 16 == 0 ? 16 : 8;
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kAtOnce) {
      float values[kAtOnce];
      read(p, position + 2 * begin, values);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float bias = values[i] * p.scores.bias_factor;
        scores[begin + i] = kAdd ? scores[begin + i] + bias : bias;
      }
    }
  }
};

}  // namespace anymask::cuda
