// Warpgroup matrix products: D[64][N] (+)= A[64][16] B[16][N], float32 accumulators.
#pragma once

#include "cuda/device/ptx/barrier.h"
#include "cuda/device/ptx/element.h"

namespace anymask::ptx {

// ---- ordering -----------------------------------------------------------------------------------

// Before the first product that reads or accumulates into registers written by other instructions.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across this point: it does not know that
// products finish later than they are issued.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// ---- matrix descriptors (128-byte swizzle) ------------------------------------------------------

// The lower word holds address and leading byte offset, the upper one stride byte offset and
// swizzle, the same for all tiles here: so only lower words are computed and kept.
__device__ __forceinline__ uint64_t descriptor(uint32_t lower) {
  constexpr uint32_t kUpper = (1024 >> 4) | (1u << 30);
  return static_cast<uint64_t>(kUpper) << 32 | lower;
}

// A tile of rows of 64 elements (128 bytes). K-major: rows are M or N, the row holds K.
__device__ __forceinline__ uint32_t lower_k_major(const void* tile) {
  return (shared_address(tile) >> 4) | (1u << 16);
}

// MN-major: rows are K, the row holds 64 of N; the next 64 of N lie `slab_bytes` further.
__device__ __forceinline__ uint32_t lower_mn_major(const void* tile, int slab_bytes) {
  return (shared_address(tile) >> 4) | (static_cast<uint32_t>(slab_bytes >> 4) << 16);
}

// K-major without a swizzle: 8 rows of 8 elements are 128 bytes in a row. The next 8 rows lie
// `row_step` bytes further, the next 8 elements of each `element_step` bytes.
__device__ __forceinline__ uint64_t narrow_descriptor(const void* tile, int row_step,
                                                      int element_step) {
  return static_cast<uint64_t>(row_step >> 4) << 32 |
         static_cast<uint32_t>(element_step >> 4) << 16 | (shared_address(tile) >> 4);
}

// ---- the products -------------------------------------------------------------------------------

// Wgmma<E, N>::product_ss: A and B from shared memory, both K-major.
// Wgmma<E, N>::product_rs: A from registers, B from shared memory, MN-major, or (kTurnB false)
// K-major.
// `accumulate` false: D is overwritten.
template <Element E, int N>
struct Wgmma;

#define ANYMASK_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ANYMASK_TEXT_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define ANYMASK_TEXT_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define ANYMASK_TEXT_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define ANYMASK_TEXT_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define ANYMASK_TEXT_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define ANYMASK_TEXT_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define ANYMASK_TEXT_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define ANYMASK_TEXT_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define ANYMASK_TEXT_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define ANYMASK_TEXT_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define ANYMASK_TEXT_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define ANYMASK_TEXT_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define ANYMASK_TEXT_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define ANYMASK_TEXT_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define ANYMASK_TEXT_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define ANYMASK_TEXT_N64 ANYMASK_TEXT_0 ", " ANYMASK_TEXT_1 ", " ANYMASK_TEXT_2 ", " ANYMASK_TEXT_3
#define ANYMASK_TEXT_N80 ANYMASK_TEXT_N64 ", " ANYMASK_TEXT_4
#define ANYMASK_TEXT_N96 ANYMASK_TEXT_N80 ", " ANYMASK_TEXT_5
#define ANYMASK_TEXT_N112 ANYMASK_TEXT_N96 ", " ANYMASK_TEXT_6
#define ANYMASK_TEXT_N128 ANYMASK_TEXT_N112 ", " ANYMASK_TEXT_7
#define ANYMASK_TEXT_N160 ANYMASK_TEXT_N128 ", " ANYMASK_TEXT_8 ", " ANYMASK_TEXT_9
#define ANYMASK_TEXT_N176 ANYMASK_TEXT_N160 ", " ANYMASK_TEXT_10
#define ANYMASK_TEXT_N192 ANYMASK_TEXT_N176 ", " ANYMASK_TEXT_11
#define ANYMASK_TEXT_N256                                                          \
  ANYMASK_TEXT_N192 ", " ANYMASK_TEXT_12 ", " ANYMASK_TEXT_13 ", " ANYMASK_TEXT_14 \
                    ", " ANYMASK_TEXT_15

#define ANYMASK_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ANYMASK_D_N64 ANYMASK_D8(0), ANYMASK_D8(8), ANYMASK_D8(16), ANYMASK_D8(24)
#define ANYMASK_D_N80 ANYMASK_D_N64, ANYMASK_D8(32)
#define ANYMASK_D_N96 ANYMASK_D_N80, ANYMASK_D8(40)
#define ANYMASK_D_N112 ANYMASK_D_N96, ANYMASK_D8(48)
#define ANYMASK_D_N128 ANYMASK_D_N112, ANYMASK_D8(56)
#define ANYMASK_D_N160 ANYMASK_D_N128, ANYMASK_D8(64), ANYMASK_D8(72)
#define ANYMASK_D_N176 ANYMASK_D_N160, ANYMASK_D8(80)
#define ANYMASK_D_N192 ANYMASK_D_N176, ANYMASK_D8(88)
#define ANYMASK_D_N256 \
  ANYMASK_D_N192, ANYMASK_D8(96), ANYMASK_D8(104), ANYMASK_D8(112), ANYMASK_D8(120)

// r: accumulators a thread (N / 2); r1..r6: r + 1 .. r + 6, the operands that follow them.
#define ANYMASK_WGMMA(E, TYPE, N, r, r1, r2, r3, r4, r5, r6)                                     \
  template <>                                                                                    \
  struct Wgmma<Element::E, N> {                                                                  \
    static __device__ __forceinline__ void product_ss(float (&d)[N / 2], uint64_t a, uint64_t b, \
                                                      bool accumulate) {                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                   " {" ANYMASK_TEXT_N##N "}, %" #r ", %" #r1 ", p, 1, 1, 0, 0;\n}"              \
                   : ANYMASK_D_N##N                                                              \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                         \
    }                                                                                            \
    template <bool kTurnB = true>                                                                \
    static __device__ __forceinline__ void product_rs(float (&d)[N / 2], const uint32_t* a,      \
                                                      uint64_t b, bool accumulate) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r5                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                   " {" ANYMASK_TEXT_N##N "}, {%" #r ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4    \
                                          ", p, 1, 1, %" #r6 ";\n}"                              \
                   : ANYMASK_D_N##N                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                         \
                     "r"(static_cast<int>(accumulate)), "n"(kTurnB ? 1 : 0));                    \
    }                                                                                            \
  };
#define ANYMASK_WGMMA_TYPES(N, r, r1, r2, r3, r4, r5, r6)    \
  ANYMASK_WGMMA(kBf16, "bf16", N, r, r1, r2, r3, r4, r5, r6) \
  ANYMASK_WGMMA(kF16, "f16", N, r, r1, r2, r3, r4, r5, r6)

ANYMASK_WGMMA_TYPES(64, 32, 33, 34, 35, 36, 37, 38)
ANYMASK_WGMMA_TYPES(80, 40, 41, 42, 43, 44, 45, 46)
ANYMASK_WGMMA_TYPES(96, 48, 49, 50, 51, 52, 53, 54)
ANYMASK_WGMMA_TYPES(112, 56, 57, 58, 59, 60, 61, 62)
ANYMASK_WGMMA_TYPES(128, 64, 65, 66, 67, 68, 69, 70)
ANYMASK_WGMMA_TYPES(160, 80, 81, 82, 83, 84, 85, 86)
ANYMASK_WGMMA_TYPES(176, 88, 89, 90, 91, 92, 93, 94)
ANYMASK_WGMMA_TYPES(192, 96, 97, 98, 99, 100, 101, 102)
ANYMASK_WGMMA_TYPES(256, 128, 129, 130, 131, 132, 133, 134)

#undef ANYMASK_WGMMA_TYPES
#undef ANYMASK_WGMMA

}  // namespace anymask::ptx
