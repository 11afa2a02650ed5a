// What the drivers share: rows of the caller's tensors, a mask's places, scratch memory.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "anymask/types.hpp"
#include "cpu/kernels.h"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cpu {

inline Element element_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return Element::f16;
    case DType::bf16:
      return Element::bf16;
    case DType::f64:
      return Element::f64;
    default:
      return Element::f32;
  }
}

// Row `row` of head `head` of a [batch, length, heads, dim] tensor.
inline char* row_at(const Tensor& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<char*>(t.data) +
         (batch * t.stride[0] + row * t.stride[1] + head * t.stride[2]) * size_of(t.dtype);
}
inline RowsIn rows_in(const Tensor& t, int64_t batch, int64_t row, int64_t head) {
  return {row_at(t, batch, row, head), t.stride[1]};
}
inline RowsOut rows_out(const Tensor& t, int64_t batch, int64_t row, int64_t head) {
  return {row_at(t, batch, row, head), t.stride[1]};
}
// Element `row` of a [batch, heads, length] tensor (lse and its gradient).
inline char* element_at(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(t.data) +
         (batch * t.stride[0] + head * t.stride[1] + row * t.stride[2]) * size_of(t.dtype);
}

// The mask place that a batch entry and query head look at.
inline rules::Place place_of(const rules::Program& program, int64_t batch, int64_t head,
                             int64_t q_heads) {
  return {program.batches == 1 ? 0 : static_cast<int>(batch),
          static_cast<int>(head / (q_heads / program.heads))};
}
inline int64_t place_index(const rules::Program& program, rules::Place place) {
  return static_cast<int64_t>(place.batch) * program.heads + place.head;
}

// The bits of outer tile `outer` of a place: words [0, map.words).
inline const uint32_t* bits_of(const uint32_t* bitmap, const plan::TileMap& map, int64_t place,
                               int64_t outer) {
  return bitmap + (place * map.outer_tiles + outer) * map.words;
}

// Calls body(inner tile, whether it needs its bits, the visible tile after it or -1) for the
// visible tiles, in order.
template <class Body>
void for_visible(const plan::TileMap& map, int64_t place, int64_t outer, const Body& body) {
  const uint32_t* visible = bits_of(map.visible, map, place, outer);
  const uint32_t* hidden = bits_of(map.hidden, map, place, outer);
  int64_t current = -1;
  bool current_some = false;
  for (int w = 0; w < map.words; ++w) {
    for (uint32_t left = visible[w]; left != 0; left &= left - 1) {
      const int bit = __builtin_ctz(left);
      const int64_t next = int64_t{w} * 32 + bit;
      if (current >= 0) body(current, current_some, next);
      current = next;
      current_some = ((hidden[w] >> bit) & 1u) != 0;
    }
  }
  if (current >= 0) body(current, current_some, int64_t{-1});
}

// Sizes of neighbouring pieces of memory: whole pages, so that threads share no cache line.
inline size_t page_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// Uninitialised memory on a cache line.
struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;
inline Memory allocate(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

inline int64_t tiles_in(int64_t length, int tile) { return (length + tile - 1) / tile; }

}  // namespace anymask::cpu
