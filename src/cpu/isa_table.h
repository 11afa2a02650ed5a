// The table of one instruction set's kernels.
#pragma once

#include "cpu/backward_tile.h"
#include "cpu/few_rows_tile.h"
#include "cpu/philox_rows.h"
#include "cpu/run_words.h"

namespace anymask::cpu::ANYMASK_ISA {

// As many independent multiply-adds as hide their latency on any CPU (4 cycles x 2 a cycle).
template <class Math>
double spin(int64_t rounds) {
  constexpr int kChains = 8;
  typename Math::Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat<typename Math::Vec>(1);
  typename Math::Items a{}, b{};
  asm volatile("" : "+x"(a), "+x"(b));
  for (int64_t r = 0; r < rounds; ++r) {
    ANYMASK_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = Math::multiply_add(a, b, sums[i]);
    asm volatile("" : "+x"(a), "+x"(b));
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(sums[i]));
  return 2.0 * kChains * kLanesOf<Math> * Math::kPair * static_cast<double>(rounds);
}

#if defined(__AVX512BF16__)
using MathOfBf16 = MathBf16;
#else
using MathOfBf16 = MathF32;
#endif

inline constexpr Kernels kTable = {
    ANYMASK_ISA_NAME,
    kept_words,
    {forward_kernel<MathF32, InF32>(), forward_kernel<MathF32, InF16>(),
     forward_kernel<MathOfBf16, InBf16>(), forward_kernel<MathF64, InF64>()},
    {few_rows_kernel<MathF32, InF32>(), few_rows_kernel<MathF32, InF16>(),
     few_rows_kernel<MathOfBf16, InBf16>(), few_rows_kernel<MathF64, InF64>()},
    {kMostFewRows<MathF32>, kMostFewRows<MathF32>, kMostFewRows<MathOfBf16>, kMostFewRows<MathF64>},
    {backward_kernel<MathF32, InF32>(), backward_kernel<MathF32, InF16>(),
     backward_kernel<MathOfBf16, InBf16>(), backward_kernel<MathF64, InF64>()},
    {spin<MathF32>, spin<MathF32>, spin<MathOfBf16>, spin<MathF64>},
    run_words,
};

}  // namespace anymask::cpu::ANYMASK_ISA
