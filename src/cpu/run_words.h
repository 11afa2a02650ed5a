// Mask words of columns that one run of rows sees: a shift per lane, where there are such shifts.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace anymask::cpu::ANYMASK_ISA {

// The rows of [first, first + 32) that come before `row`, any row.
ANYMASK_INLINE uint32_t rows_before(int row, int first) {
  const int last = first + 32;
  const int count = (row < first ? first : row > last ? last : row) - first;
  return count == 32 ? 0xffffffffu : (1u << count) - 1u;
}

// See kernels.h. A plain loop, which the compiler makes vectors of.
inline void run_words(const int32_t* __restrict begin, const int32_t* __restrict end, int keys,
                      int first_row, bool add, uint32_t* __restrict words) {
  for (int i = 0; i < keys; ++i) {
    const uint32_t run = rows_before(end[i], first_row) & ~rows_before(begin[i], first_row);
    words[i] = add ? words[i] | run : run;
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
