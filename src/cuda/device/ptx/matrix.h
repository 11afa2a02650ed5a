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

// The same of matrices that are transposed on their way: lane l holds elements of column l / 4.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b,
                                                          uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The halves of a packed pair, as floats.
template <bool kHalf>
__device__ __forceinline__ float low_of(uint32_t pair) {
  if constexpr (!kHalf) return __uint_as_float(pair << 16);
  float y;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
      : "=f"(y)
      : "r"(pair));
  return y;
}
template <bool kHalf>
__device__ __forceinline__ float high_of(uint32_t pair) {
  if constexpr (!kHalf) return __uint_as_float(pair & 0xffff0000u);
  float y;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}"
      : "=f"(y)
      : "r"(pair));
  return y;
}

}  // namespace anymask::ptx
