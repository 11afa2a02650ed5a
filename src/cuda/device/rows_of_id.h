// Words of ids' bits.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

// Which of 32 rows share this lane's column id, or are open to all columns: the few different ids
// among 32 rows are gone through one by one. A converged warp; `row_id`: of the row `lane`, where
// `rows` has its bit.
__device__ __forceinline__ uint32_t rows_of_id(int64_t row_id, int64_t column_id, uint32_t rows,
                                               bool open) {
  const uint32_t open_rows = open ? __ballot_sync(0xffffffffu, row_id >= 0) : 0;
  uint32_t seen = open_rows, left = rows & ~open_rows;
  while (left != 0) {
    const int64_t id = __shfl_sync(0xffffffffu, static_cast<long long>(row_id), __ffs(left) - 1);
    const uint32_t same = __ballot_sync(0xffffffffu, row_id == id);
    if (column_id == id) seen |= same;
    left &= ~same;
  }
  return seen;
}

}  // namespace anymask::cuda
