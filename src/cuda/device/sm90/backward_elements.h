// What math threads of the Hopper backward kernel do element by element, and how fragments of P^T
// and dS^T reach shared memory.
//
// Everything is transposed: rows are keys, columns are queries. Of a 64 x 64 piece a thread holds
// keys lane / 4 and lane / 4 + 8 of its warp's 16, and of each 8 queries two: 8k + 2q and 8k + 2q +
// 1, q = lane % 4. Value i belongs to k = i / 4, key r = i / 2 % 2, query i % 2.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/matrix.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/tma.h"
#include "cuda/device/ptx/wgmma.h"
#include "cuda/device/sm90/backward_shared.h"
#include "cuda/device/sm90/backward_store.h"

namespace anymask::cuda {

inline constexpr int kPieceValues = kBackwardRows / 2;  // of a thread, in a 64 x 64 piece

template <bool kHalf>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}

// The statistics that the constants `units` pick, added to a piece of S or dP. All keys have the
// same constants, so their 8 rows serve for all 64; the upper 8 elements of a product of 16 are 0
// there, and of the statistics they are the lower ones once more.
template <bool kHalf>
__device__ __forceinline__ void add_stats(float (&piece)[kPieceValues],
                                          const uint16_t (*units)[kRowStats], int zeros_after,
                                          const uint16_t (*stats)[kRowStats]) {
  using Product = ptx::Wgmma<kHalf ? ptx::Element::kF16 : ptx::Element::kBf16, kBackwardRows>;
  Product::product_ss(piece, ptx::narrow_descriptor(units, 0, zeros_after),
                      ptx::narrow_descriptor(stats, 128, 0), true);
}

// P = exp2((S - lse / scale) * scale), in place.
__device__ __forceinline__ void weights_from_scores(float (&values)[kPieceValues],
                                                    float scale_log2) {
#pragma unroll
  for (int i = 0; i < kPieceValues; ++i) values[i] = ptx::exp2_fast(values[i] * scale_log2);
}

// P = 0 where a pair is hidden. words[r]: 64 rows of this thread's key r, shifted right by 2q.
// (P, not S: with a negative scale a score of -infinity would become a weight of +infinity.)
__device__ __forceinline__ void hide(float (&values)[kPieceValues], const uint32_t (&words)[2][2]) {
#pragma unroll
  for (int i = 0; i < kPieceValues; ++i) {
    const int k = i / 4, bit = 8 * (k % 4) + i % 2;
    const bool visible = (words[(i / 2) % 2][k / 4] >> bit) & 1;
    values[i] = visible ? values[i] : 0.0f;
  }
}

// Reads the words of this thread's two keys; `key`: the first of them.
__device__ __forceinline__ void read_words(const uint32_t (*bits)[2], int key, int q,
                                           uint32_t (&words)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint2 both = *reinterpret_cast<const uint2*>(bits[key + 8 * r]);
    words[r][0] = both.x >> (2 * q);
    words[r][1] = both.y >> (2 * q);
  }
}

__device__ __forceinline__ void hide_all(float (&values)[kPieceValues]) {
#pragma unroll
  for (int i = 0; i < kPieceValues; ++i) values[i] = 0.0f;
}

// Whether a warp's words show anything. Who knows has read them, so that the copy engine may write
// to their place (see StripBits::release_copied).
__device__ __forceinline__ bool any_of(const uint32_t (&words)[2][2]) {
  return __any_sync(0xffffffffu, (words[0][0] | words[0][1] | words[1][0] | words[1][1]) != 0);
}

// Rows [row, row + 32) that see a key.
template <int kKeys>
__device__ __forceinline__ uint32_t word_of_runs(const BackwardParams& p,
                                                 const KeyRuns<kKeys>& runs, int key, int row) {
  uint32_t word = ptx::ones_between(runs.ends[0][key] - row, runs.ends[1][key] - row);
#pragma unroll 1
  for (int hole = 1; hole <= p.recipe.holes; ++hole) {
    word &= ~ptx::ones_between(runs.ends[2 * hole][key] - row, runs.ends[2 * hole + 1][key] - row);
  }
  return word;
}

// The words that read_words reads, from the runs of rows that see the keys. `row`: the tile's
// first.
template <int kKeys>
__device__ __forceinline__ void words_of_runs(const BackwardParams& p, const KeyRuns<kKeys>& runs,
                                              int key, int q, int row, uint32_t (&words)[2][2]) {
  row += 2 * q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = runs.ends[0][key + 8 * r] - row, end = runs.ends[1][key + 8 * r] - row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[r][half] = ptx::ones_between(begin - 32 * half, end - 32 * half);
    }
  }
  // A loop that runs zero times for most masks: one branch, and nothing is predicated.
#pragma unroll 1
  for (int hole = 1; hole <= p.recipe.holes; ++hole) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = runs.ends[2 * hole][key + 8 * r] - row;
      const int end = runs.ends[2 * hole + 1][key + 8 * r] - row;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[r][half] &= ~ptx::ones_between(begin - 32 * half, end - 32 * half);
      }
    }
  }
}

// dS = P (dP - sums), packed as an A operand. `weight_grads`: dP - sums; `weight(i)`: P.
template <bool kHalf, typename Weight>
__device__ __forceinline__ void pack_slopes(const float (&weight_grads)[kPieceValues],
                                            Weight&& weight, uint32_t (&slopes)[kPieceValues / 2]) {
#pragma unroll
  for (int i = 0; i < kPieceValues; i += 2) {
    slopes[i / 2] =
        pack_pair<kHalf>(weight(i) * weight_grads[i], weight(i + 1) * weight_grads[i + 1]);
  }
}

// Where this lane's row of matrices lies in a tile of 64-query rows under the 128-byte swizzle, for
// queries 0..15 (the upper 8 for lanes from 16 on); 16 queries further is an exclusive or.
__device__ __forceinline__ uint32_t fragment_address(const void* tile, int first_key, int lane) {
  const int key = first_key + lane % 16;
  return ptx::shared_address(tile) + key * kSlabRowBytes + (((lane / 16) ^ (lane % 8)) << 4);
}

__device__ __forceinline__ void store_fragments(uint32_t address,
                                                const uint32_t (&packed)[kPieceValues / 2]) {
#pragma unroll
  for (int step = 0; step < kBackwardRows / 16; ++step) {
    ptx::store_matrices(address ^ (step << 5), packed[4 * step], packed[4 * step + 1],
                        packed[4 * step + 2], packed[4 * step + 3]);
  }
}

__device__ __forceinline__ void load_fragments(uint32_t address,
                                               uint32_t (&packed)[kPieceValues / 2]) {
#pragma unroll
  for (int step = 0; step < kBackwardRows / 16; ++step) {
    ptx::load_matrices(address ^ (step << 5), &packed[4 * step]);
  }
}

// 64 columns of a warp's 16 rows, times scale.
template <bool kHalf, int kCount>
__device__ __forceinline__ void pack_slab(const float (&grad)[kCount], int slab, float scale,
                                          uint32_t (&packed)[kPieceValues / 2]) {
#pragma unroll
  for (int i = 0; i < kPieceValues; i += 2) {
    const int at = kPieceValues * slab + i;
    packed[i / 2] = pack_pair<kHalf>(grad[at] * scale, grad[at + 1] * scale);
  }
}

// Columns [64 slab, 64 slab + 64) of 16 rows of a tensor, times scale, by way of `place` and the
// copy engine, which costs a third of what stores from registers do. Of this warp's copies the last
// kPending may still be reading.
template <bool kHalf, int kPending, int kCount>
__device__ __forceinline__ void store_piece(uint8_t* place, const TensorMapBytes& map,
                                            const float (&values)[kCount], int slab, float scale,
                                            int first_row, int head, int batch, int lane) {
  uint32_t packed[kPieceValues / 2];
  pack_slab<kHalf>(values, slab, scale, packed);
  ptx::bulk_wait_read<kPending>();
  __syncwarp();
  store_fragments(fragment_address(place, 0, lane), packed);
  ptx::fence_async_shared();
  __syncwarp();
  if (lane == 0) {
    ptx::store_box(&map, place, slab * kSlabColumns, first_row, head, batch);
    ptx::bulk_commit();
  }
}

}  // namespace anymask::cuda
