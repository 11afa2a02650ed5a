// Small vocabulary shared by the C++ compiler (CPU) and NVRTC (GPU): no standard header on the GPU.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define ANYMASK_RULE __host__ __device__ __forceinline__
#else
#define ANYMASK_RULE inline
#endif

namespace anymask::rules {

// Rows are handled in words of 32: one bit per query row, least significant bit first.
inline constexpr int kWordRows = 32;
inline constexpr uint32_t kAllRows = 0xffffffffu;

ANYMASK_RULE constexpr int min_of(int a, int b) { return a < b ? a : b; }
ANYMASK_RULE constexpr int max_of(int a, int b) { return a > b ? a : b; }
ANYMASK_RULE constexpr int clamp_to(int x, int low, int high) {
  return min_of(max_of(x, low), high);
}

// The `count` lowest bits, 0 <= count <= 32.
ANYMASK_RULE constexpr uint32_t low_bits(int count) {
  return count >= kWordRows ? kAllRows : (1u << count) - 1u;
}

// The bits of rows begin <= row < end inside the word of rows [first, first + 32).
ANYMASK_RULE constexpr uint32_t run_word(int begin, int end, int first) {
  const int from = clamp_to(begin, first, first + kWordRows) - first;
  const int to = clamp_to(end, first, first + kWordRows) - first;
  return low_bits(to) & ~low_bits(from);
}

}  // namespace anymask::rules
