// The keys of a tile, where the plan may have put them in another order.
#pragma once

#include <cstring>

#include "cpu/view.h"
#include "rules/evaluate.h"

namespace anymask::cpu {

// The keys at positions [first, first + count) of a plan, for one kv head.
struct TileKeys {
  const rules::Program* program;
  rules::Place place;
  int64_t batch, kv_head, first;
  int count;

  bool reordered() const { return program->key_order != nullptr; }
  int64_t key(int i) const { return rules::key_at(*program, place, static_cast<int>(first) + i); }
};

inline size_t gathered_bytes(const Tensor& t, int64_t tile_keys) {
  return static_cast<size_t>(tile_keys * t.shape[3] * size_of(t.dtype));
}

// Rows of k or v: straight from the caller's memory, or gathered into `buffer`.
inline RowsIn keys_in(const Tensor& t, const TileKeys& keys, char* buffer) {
  if (!keys.reordered()) return rows_in(t, keys.batch, keys.first, keys.kv_head);
  const size_t bytes = static_cast<size_t>(t.shape[3] * size_of(t.dtype));
  for (int i = 0; i < keys.count; ++i) {
    std::memcpy(buffer + static_cast<size_t>(i) * bytes,
                row_at(t, keys.batch, keys.key(i), keys.kv_head), bytes);
  }
  return {buffer, t.shape[3]};
}

// Where rows of dk or dv go: straight to the caller's memory, or to `buffer` until scatter_keys.
inline RowsOut keys_out(const Tensor& t, const TileKeys& keys, char* buffer) {
  if (!keys.reordered()) return rows_out(t, keys.batch, keys.first, keys.kv_head);
  return {buffer, t.shape[3]};
}
inline void scatter_keys(const Tensor& t, const TileKeys& keys, const char* buffer) {
  if (!keys.reordered()) return;
  const size_t bytes = static_cast<size_t>(t.shape[3] * size_of(t.dtype));
  for (int i = 0; i < keys.count; ++i) {
    std::memcpy(row_at(t, keys.batch, keys.key(i), keys.kv_head),
                buffer + static_cast<size_t>(i) * bytes, bytes);
  }
}

}  // namespace anymask::cpu
