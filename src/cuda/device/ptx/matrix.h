// 8 x 8 matrices of 16-bit elements between registers and shared memory, four at a time. Lane l
// gives the address of row l % 8 of matrix l / 8 and holds elements 2 (l % 4) and the next of row
// l / 4 of each: the fragments of wgmma.
#pragma once

#include "cuda/device/ptx/barrier.h"

namespace anymask::ptx {

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t* to) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

}  // namespace anymask::ptx
