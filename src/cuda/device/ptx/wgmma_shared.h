// Warpgroup products with both operands in shared memory and either of them stored transposed.
#pragma once

#include "cuda/device/ptx/wgmma.h"

namespace anymask::ptx {

#define ANYMASK_TEXT_N32 ANYMASK_TEXT_0 ", " ANYMASK_TEXT_1
#define ANYMASK_D_N32 ANYMASK_D8(0), ANYMASK_D8(8)

// SharedProduct<E, N, kTurnA>::run: D[64][N] (+)= A[64][16] B[16][N]. B is MN-major; A is K-major
// or (kTurnA) MN-major. Uses the first N / 2 of d. `accumulate` false: D is overwritten.
template <Element E, int N, bool kTurnA>
struct SharedProduct;

// r: accumulators a thread (N / 2); r1, r2: the operands that follow them.
#define ANYMASK_SHARED(E, TYPE, N, TURN, TURN_TEXT, r, r1, r2)                                  \
  template <>                                                                                   \
  struct SharedProduct<Element::E, N, TURN> {                                                   \
    template <int kCount>                                                                       \
    static __device__ __forceinline__ void run(float (&d)[kCount], uint64_t a, uint64_t b,      \
                                               bool accumulate) {                               \
      static_assert(kCount >= N / 2);                                                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2                                     \
                   ", 0;\n"                                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE              \
                   " {" ANYMASK_TEXT_N##N "}, %" #r ", %" #r1 ", p, 1, 1, " TURN_TEXT ", 1;\n}" \
                   : ANYMASK_D_N##N                                                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                        \
    }                                                                                           \
  };
#define ANYMASK_SHARED_ALL(N, r, r1, r2)                  \
  ANYMASK_SHARED(kBf16, "bf16", N, false, "0", r, r1, r2) \
  ANYMASK_SHARED(kBf16, "bf16", N, true, "1", r, r1, r2)  \
  ANYMASK_SHARED(kF16, "f16", N, false, "0", r, r1, r2)   \
  ANYMASK_SHARED(kF16, "f16", N, true, "1", r, r1, r2)

ANYMASK_SHARED_ALL(32, 16, 17, 18)
ANYMASK_SHARED_ALL(64, 32, 33, 34)
ANYMASK_SHARED_ALL(128, 64, 65, 66)

#undef ANYMASK_SHARED_ALL
#undef ANYMASK_SHARED

}  // namespace anymask::ptx
