// Work on whole rows of the caller's memory: sums per row, rounding to the caller's type.
#pragma once

#include "cpu/convert.h"
#include "cpu/kernels.h"

namespace anymask::cpu::ANYMASK_ISA {

// Rows of sums to the caller's type.
template <class In, class T>
ANYMASK_INLINE void round_rows(const T* from, int64_t from_stride, int rows, int columns,
                               RowsOut out) {
  using Vec = typename In::Vec;
  constexpr int kLanes = Lanes<Vec>::kCount;
  for (int r = 0; r < rows; ++r) {
    auto* to = static_cast<typename In::Raw*>(out.data) + r * out.stride;
    for (int d = 0; d < columns; d += kLanes) {
      const int count = columns - d < kLanes ? columns - d : kLanes;
      const T* at = from + r * from_stride + d;
      store_as<In>(to + d, count == kLanes ? load<Vec>(at) : load_first<Vec>(at, count), count);
    }
  }
}

// The backward pass's delta, see kernels.h.
template <class In>
void row_delta(RowsIn dout, RowsIn out, const void* dlse, int rows, int v_head_dim, void* delta) {
  using Vec = typename In::Vec;
  using T = typename Lanes<Vec>::T;
  constexpr int kLanes = Lanes<Vec>::kCount;
  for (int r = 0; r < rows; ++r) {
    const auto* a = static_cast<const typename In::Raw*>(dout.data) + r * dout.stride;
    const auto* b = static_cast<const typename In::Raw*>(out.data) + r * out.stride;
    Vec sums{};
    for (int d = 0; d < v_head_dim; d += kLanes) {
      const int count = v_head_dim - d < kLanes ? v_head_dim - d : kLanes;
      sums += load_as<In>(a + d, count) * load_as<In>(b + d, count);
    }
    const T total = sum_of_lanes(sums);
    static_cast<T*>(delta)[r] = dlse == nullptr ? total : total - static_cast<const T*>(dlse)[r];
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
