// 32 words of 32 bits, transposed across a warp.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

// Bit j of lane i becomes bit i of lane j: ever smaller blocks off the diagonal change places.
inline uint32_t transpose_bits(uint32_t word, int lane) {
  uint32_t low = 0x0000ffffu;  // of a pair of blocks, the bits of the lower one
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int size = 16; size > 0; size /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, size);
    word = (lane & size) != 0 ? (word & ~low) | ((other >> size) & low)
                              : (word & low) | ((other << size) & ~low);
    low ^= low << (size / 2);
  }
  return word;
}

}  // namespace anymask::cuda
