// From wgmma accumulators to rows of a tensor: dK and dV at the end of an item, dQ at the very end.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/softmax.h"  // transpose_quad

namespace anymask::cuda {

// A warp's 16 of 64 rows. `to`: the first column of the accumulators; their rows begin at
// `first_row`, rows from `rows` and columns from `columns` on do not exist. `order`: where each row
// really lies, or null. Quads gather 8 columns a lane, so that a row is written 64 bytes at a time.
template <bool kHalf, int kCount>
__device__ __forceinline__ void store_rows(const float (&values)[kCount], float scale, uint16_t* to,
                                           int64_t row_stride, const int32_t* order, int first_row,
                                           int rows, int columns, int warp, int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 16 * warp + lane / 4 + 8 * r;
    const int place = order != nullptr && row < rows ? order[row] : row;
    uint16_t* line = to + place * row_stride;
#pragma unroll
    for (int j = 0; j < kCount / 16; ++j) {
      uint32_t pieces[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * r;
        const float low = values[at] * scale, high = values[at + 1] * scale;
        pieces[i] = kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
      }
      transpose_quad(pieces, q);
      const int column = 8 * (4 * j + q);
      if (row < rows && column < columns) {
        ptx::store_global(line + column, pieces[0], pieces[1], pieces[2], pieces[3]);
      }
    }
  }
}

// A warp's 16 rows of shared memory, kSlabs x 64 columns under the 128-byte swizzle, to rows of a
// tensor as above. `slab`: the first of them; a slab is kSlabBytes long.
template <int kSlabs, int kSlabBytes>
__device__ __forceinline__ void copy_rows(const uint8_t* slab, uint16_t* to, int64_t row_stride,
                                          const int32_t* order, int first_row, int rows,
                                          int columns, int lane) {
  constexpr int kLanes = 8 * kSlabs;  // of a row, 16 bytes each
  const int part = lane % kLanes;
  const uint8_t* from = slab + part / 8 * kSlabBytes;
#pragma unroll
  for (int i = 0; i < 16; i += 32 / kLanes) {
    const int at = i + lane / kLanes, row = first_row + at;
    if (row >= rows || 8 * part >= columns) continue;
    const uint4 all =
        *reinterpret_cast<const uint4*>(from + at * kSlabRowBytes + ((part % 8 ^ at % 8) << 4));
    const int place = order != nullptr ? order[row] : row;
    ptx::store_global(to + place * row_stride + 8 * part, all.x, all.y, all.z, all.w);
  }
}

}  // namespace anymask::cuda
