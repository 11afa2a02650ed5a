// Products of a single warp, operands in registers, for what is too little for wgmma.
#pragma once

#include "rules/common.h"

namespace anymask::ptx {

// c += a b, a of 16 x 16 and b of 16 x 8 16-bit elements. Lane l has of row l / 4 of a: a.x and
// a.z; of row l / 4 + 8: a.y and a.w; of column l / 4 of b: b_low and b_high. Each is two of the
// depth: the same two a.x, a.y and b_low, and a.z, a.w and b_high. Of c: row l / 4, columns 2 (l %
// 4) and the next, and those of row l / 4 + 8.
template <bool kHalf>
__device__ __forceinline__ void multiply_16x8(float (&c)[4], const uint4& a, uint32_t b_low,
                                              uint32_t b_high) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_low), "r"(b_high));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_low), "r"(b_high));
  }
}

}  // namespace anymask::ptx
