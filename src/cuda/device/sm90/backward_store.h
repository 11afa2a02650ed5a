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

}  // namespace anymask::cuda
