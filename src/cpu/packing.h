// Operands of the products: where they lie in scratch memory, how the caller's rows get there, and
// fetching rows ahead of time.
#pragma once

#include "cpu/arithmetic.h"

namespace anymask::cpu::ANYMASK_ISA {

ANYMASK_INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Hands out 64-byte aligned pieces of scratch memory.
struct Arena {
  char* at;
  template <class T>
  ANYMASK_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Row stride of packed operands: whole vectors, and one line more, so that rows of 2^n bytes do
// not all fall into the same cache sets.
template <class Math>
ANYMASK_INLINE int padded(int items) {
  return round_up(items, kLanesOf<Math>) + 64 / static_cast<int>(sizeof(typename Math::Item));
}

// Fetches part of a tile's rows: in [batch, length, heads, dim] tensors rows lie in pages of their
// own, where the hardware's prefetchers do not look (without this, 80% of peak instead of 87%).
struct Ahead {
  const char* data;  // nullptr: nothing to fetch
  int64_t step;
  int64_t bytes;  // of each row

  // Share `part` of `parts` of every row.
  static ANYMASK_INLINE Ahead share(const void* rows, int64_t stride, int row_items, int64_t size,
                                    int part, int parts) {
    if (rows == nullptr) return {};
    const int64_t bytes = (row_items * size / parts + 63) / 64 * 64;
    return {static_cast<const char*>(rows) + part * bytes, stride * size, bytes};
  }
  ANYMASK_INLINE void fetch(int row, int count) const {
    if (data == nullptr) return;
    for (int i = row; i < row + count; ++i) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + i * step + at, 0, 2);
    }
  }
};

// How operands of `In` become items of `Math`: numbers are widened, pairs are taken as they lie.
template <class Math, class In>
ANYMASK_INLINE typename Math::Items load_items(const typename In::Raw* from, int count) {
  if constexpr (Math::kPair == 2) {
    constexpr int kLanes = kLanesOf<Math>;
    return count >= kLanes ? load<typename Math::Items>(from)
                           : load_first<typename Math::Items>(from, count);
  } else {
    return load_as<In>(from, count);
  }
}

template <class Math>
ANYMASK_INLINE typename Math::Items negated(typename Math::Items x) {
  if constexpr (Math::kPair == 2) {
    return x ^ 0x80008000u;
  } else {
    return -x;
  }
}

// Rows of items to strips of columns: to[strip][item][row in strip]; rows that do not exist are 0.
// `items` per row: head_dim / kPair. `flip`: changes the sign.
template <class Math, class In>
inline void pack_transposed(const typename In::Raw* from, int64_t stride, int rows, int strips,
                            int items, bool flip, typename Math::Item* to) {
  using Items = typename Math::Items;
  constexpr int kLanes = kLanesOf<Math>;
  for (int first = 0; first < strips * kStrip<Math>; first += kLanes) {
    typename Math::Item* strip = to +
                                 static_cast<int64_t>(first / kStrip<Math>) * items * kStrip<Math> +
                                 first % kStrip<Math>;
    for (int item = 0; item < items; item += kLanes) {
      const int count = items - item < kLanes ? items - item : kLanes;
      Items square[kLanes];
      ANYMASK_UNROLL
      for (int r = 0; r < kLanes; ++r) {
        square[r] = Items{};
        if (first + r < rows) {
          square[r] = load_items<Math, In>(from + (first + r) * stride + item * Math::kPair, count);
        }
      }
      transpose(square);
      for (int i = 0; i < count; ++i) {
        store(strip + static_cast<int64_t>(item + i) * kStrip<Math>,
              flip ? negated<Math>(square[i]) : square[i]);
      }
    }
  }
}

// Rows of items as they are: to[row][item], zeros from `rows` up to `padded_rows` and from
// head_dim / kPair up to a whole vector.
template <class Math, class In>
inline void pack_rows(const typename In::Raw* from, int64_t stride, int rows, int padded_rows,
                      int items, typename Math::Item* to, int64_t to_stride) {
  using Items = typename Math::Items;
  constexpr int kLanes = kLanesOf<Math>;
  for (int r = 0; r < padded_rows; ++r) {
    for (int item = 0; item < items; item += kLanes) {
      const int count = items - item < kLanes ? items - item : kLanes;
      store(
          to + r * to_stride + item,
          r < rows ? load_items<Math, In>(from + r * stride + item * Math::kPair, count) : Items{});
    }
  }
}

// Rows as the right operand of a product that sums over rows: numbers as in pack_rows, bf16 as
// pairs of neighbouring rows, to[row / 2][column]. `padded_rows` is even where pairs are made.
template <class Math, class In>
inline void pack_depth(const typename In::Raw* from, int64_t stride, int rows, int padded_rows,
                       int columns, typename Math::Item* to, int64_t to_stride) {
  if constexpr (Math::kPair == 1) {
    pack_rows<Math, In>(from, stride, rows, padded_rows, columns, to, to_stride);
  } else {
    constexpr int kLanes = kLanesOf<Math>;
    const auto row = [&](int r, int column, int count) {
      VecU16 x{};
      if (r < rows) {
        const typename In::Raw* at = from + r * stride + column;
        x = count >= kLanes ? load<VecU16>(at) : load_first<VecU16>(at, count);
      }
      return widen_words(x);
    };
    for (int r = 0; r < padded_rows; r += 2) {
      for (int column = 0; column < columns; column += kLanes) {
        const int count = columns - column < kLanes ? columns - column : kLanes;
        store(to + (r / 2) * to_stride + column,
              row(r, column, count) | (row(r + 1, column, count) << 16));
      }
    }
  }
}

}  // namespace anymask::cpu::ANYMASK_ISA
