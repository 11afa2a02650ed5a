#include "cpu/score_gradients.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/threads.h"

namespace anymask::cpu {
namespace {

// The step of a dimension, 0 where a single entry serves all.
int64_t step(const Tensor& t, int dimension) {
  return t.shape[dimension] == 1 ? 0 : t.stride[dimension];
}

char* at(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.data) + element * size_of(t.dtype);
}

int64_t elements(const Tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3]; }

// Row `from` of a tile's keys to the caller's keys of row `to`.
template <class E, bool kAdd>
void put_row(const E* from, const TileKeys& keys, E* to) {
  const auto put = [&](E& place, E value) { place = kAdd ? static_cast<E>(place + value) : value; };
  if (!keys.reordered()) {
    for (int i = 0; i < keys.count; ++i) put(to[keys.first + i], from[i]);
  } else {
    for (int i = 0; i < keys.count; ++i) put(to[keys.key(i)], from[i]);
  }
}

template <class T>
double sink_share(double sink, const void* lse, const void* delta, int rows) {
  double share = 0;
  for (int r = 0; r < rows; ++r) {
    share += std::exp(sink - static_cast<const T*>(lse)[r]) * static_cast<const T*>(delta)[r];
  }
  return share;
}

}  // namespace

ScoreGradients::ScoreGradients(const BackwardCall& call)
    : call_(call),
      kernel_(kernels().backward[static_cast<int>(element_of(call.q.dtype))]),
      batch_(call.q.shape[0]),
      q_len_(call.q.shape[1]),
      q_heads_(call.q.shape[2]),
      kv_len_(call.k.shape[1]),
      kv_heads_(call.k.shape[2]),
      row_tiles_(tiles_in(q_len_, call.rows.shape.rows)),
      tile_keys_(call.rows.shape.columns),
      sum_type_(call.q.dtype == DType::f64 ? DType::f64 : DType::f32),
      heads_a_round_(std::max<int64_t>(1, batch_ * kv_heads_)) {
  const Tensor& dbias = call.dbias;
  const int64_t sum_size = size_of(sum_type_);
  const bool of_pairs = dbias.given() && dbias.shape[2] > 1;
  const bool of_columns = call.dkey_bias.given() || (dbias.given() && !of_pairs);
  if (of_pairs || of_columns) {
    dlogits_bytes_ =
        page_up(static_cast<size_t>(call.rows.shape.rows * int64_t{tile_keys_} * sum_size));
  }
  if (of_columns) {
    columns_ = allocate(static_cast<size_t>(batch_ * q_heads_ * kv_len_ * sum_size));
  }
  if (of_pairs) {
    const bool heads_share = dbias.shape[1] < q_heads_, batches_share = dbias.shape[0] < batch_;
    if (batches_share) heads_a_round_ = std::max<int64_t>(1, kv_heads_);
    if (heads_share) heads_a_round_ = 1;
    pairs_ = dbias;
    if (dbias.dtype != sum_type_ && (heads_share || batches_share)) {
      pairs_memory_ = allocate(static_cast<size_t>(elements(dbias) * sum_size));
      pairs_ = Tensor(pairs_memory_.get(), sum_type_,
                      {dbias.shape[0], dbias.shape[1], dbias.shape[2], dbias.shape[3]});
    }
    if (pairs_.dtype != sum_type_) {
      rounded_bytes_ = page_up(static_cast<size_t>(call.rows.shape.rows * tile_keys_ * 2));
    }
  }
  if (call.dsink.given()) sinks_.resize(static_cast<size_t>(batch_ * q_heads_ * row_tiles_));
}

// Tiles that the mask skips leave zeros.
void ScoreGradients::begin() {
  const size_t sum_size = static_cast<size_t>(size_of(sum_type_));
  if (columns_ != nullptr) {
    std::memset(columns_.get(), 0, static_cast<size_t>(batch_ * q_heads_ * kv_len_) * sum_size);
  }
  if (!pairs_.given() || elements(pairs_) == 0) return;
  const Tensor& t = pairs_;
  const auto bytes = static_cast<size_t>(t.shape[3] * size_of(t.dtype));
  parallel_for(t.shape[0] * t.shape[1] * t.shape[2], [&](int64_t task, int) {
    const int64_t row = task % t.shape[2], place = task / t.shape[2];
    std::memset(at(t, place / t.shape[1] * t.stride[0] + place % t.shape[1] * t.stride[1] +
                          row * t.stride[2]),
                0, bytes);
  });
}

void ScoreGradients::add_rows(int64_t batch, int64_t head, int64_t row_tile, int rows, double sink,
                              const void* lse, const void* delta) {
  if (sinks_.empty() || sink == -INFINITY) return;  // a sink of -inf weighs nothing
  const double share = sum_type_ == DType::f64 ? sink_share<double>(sink, lse, delta, rows)
                                               : sink_share<float>(sink, lse, delta, rows);
  sinks_[static_cast<size_t>((batch * q_heads_ + head) * row_tiles_ + row_tile)] = -share;
}

void ScoreGradients::add_tile(const TileKeys& keys, int64_t head, int64_t row, int rows,
                              char* memory) {
  if (columns_ != nullptr) {
    sum_type_ == DType::f64 ? add_columns<double>(keys, head, rows, memory)
                            : add_columns<float>(keys, head, rows, memory);
  }
  if (pairs_.given()) add_pairs(keys, head, row, rows, memory);
}

// A head's keys belong to the task of their tile.
template <class T>
void ScoreGradients::add_columns(const TileKeys& keys, int64_t head, int rows,
                                 const void* dlogits) {
  T sums[kMaxTileKeys] = {};
  const T* from = static_cast<const T*>(dlogits);
  for (int r = 0; r < rows; ++r, from += tile_keys_) {
    for (int i = 0; i < keys.count; ++i) sums[i] += from[i];
  }
  put_row<T, true>(sums, keys,
                   static_cast<T*>(columns_.get()) + (keys.batch * q_heads_ + head) * kv_len_);
}

void ScoreGradients::add_pairs(const TileKeys& keys, int64_t head, int64_t row, int rows,
                               char* memory) {
  const Tensor& t = pairs_;
  const int64_t first = keys.batch * step(t, 0) + head * step(t, 1) + row * t.stride[2];
  const RowsOut rounded{memory + dlogits_bytes_, tile_keys_};
  if (t.dtype != sum_type_) kernel_.round({memory, tile_keys_}, rows, keys.count, rounded);
  for (int r = 0; r < rows; ++r) {
    char* to = at(t, first + r * t.stride[2]);
    const int64_t from = int64_t{r} * tile_keys_;
    if (t.dtype == DType::f64) {
      put_row<double, true>(reinterpret_cast<double*>(memory) + from, keys,
                            reinterpret_cast<double*>(to));
    } else if (t.dtype == DType::f32) {
      put_row<float, true>(reinterpret_cast<float*>(memory) + from, keys,
                           reinterpret_cast<float*>(to));
    } else {
      put_row<uint16_t, false>(static_cast<uint16_t*>(rounded.data) + from, keys,
                               reinterpret_cast<uint16_t*>(to));
    }
  }
}

// Writes sums in the type of a gradient.
void ScoreGradients::write(const Tensor& like, const void* sums, int count, void* to) const {
  if (like.dtype == sum_type_) {
    std::memcpy(to, sums, static_cast<size_t>(count * size_of(sum_type_)));
  } else {
    kernel_.round({sums, 0}, 1, count, {to, 0});
  }
}

// Sums the columns of each batch entry and head to a gradient [batch or 1, heads, kv_len].
template <class T>
void ScoreGradients::sum_columns(const Tensor& to) {
  constexpr int64_t kPiece = 1024;
  const int64_t batches = to.shape[0], heads = to.shape[1];
  const int64_t group = q_heads_ / std::max<int64_t>(1, heads);
  const int64_t pieces = (kv_len_ + kPiece - 1) / kPiece;
  parallel_for(batches * heads * pieces, [&](int64_t task, int) {
    const int64_t key = task % pieces * kPiece, head = task / pieces % heads;
    const int64_t batch = task / (pieces * heads);
    const int count = static_cast<int>(std::min(kPiece, kv_len_ - key));
    T sums[kPiece] = {};
    for (int64_t b = batch; b < (batches == 1 ? batch_ : batch + 1); ++b) {
      for (int64_t h = head * group; h < (head + 1) * group; ++h) {
        const T* from = static_cast<const T*>(columns_.get()) + (b * q_heads_ + h) * kv_len_ + key;
        for (int i = 0; i < count; ++i) sums[i] += from[i];
      }
    }
    write(to, sums, count, at(to, batch * to.stride[0] + head * to.stride[1] + key));
  });
}

void ScoreGradients::end() {
  const auto sum = [&](const Tensor& to) {
    sum_type_ == DType::f64 ? sum_columns<double>(to) : sum_columns<float>(to);
  };
  const Tensor &dbias = call_.dbias, &dsink = call_.dsink;
  if (call_.dkey_bias.given()) sum(call_.dkey_bias);
  if (dbias.given() && dbias.shape[2] == 1) sum(dbias);
  if (pairs_memory_ != nullptr) {
    const Tensor& t = dbias;
    parallel_for(t.shape[0] * t.shape[1], [&](int64_t task, int) {
      const auto place = [&](const Tensor& of) {
        return at(of, task / t.shape[1] * of.stride[0] + task % t.shape[1] * of.stride[1]);
      };
      kernel_.round({place(pairs_), pairs_.stride[2]}, static_cast<int>(t.shape[2]),
                    static_cast<int>(t.shape[3]), {place(t), t.stride[2]});
    });
  }
  for (int64_t h = 0; dsink.given() && h < q_heads_; ++h) {
    double total = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const auto first = sinks_.begin() + (b * q_heads_ + h) * row_tiles_;
      for (int64_t i = 0; i < row_tiles_; ++i) total += first[i];
    }
    const auto single = static_cast<float>(total);
    const void* sums = sum_type_ == DType::f64 ? static_cast<const void*>(&total) : &single;
    write(dsink, sums, 1, at(dsink, h * dsink.stride[0]));
  }
}

}  // namespace anymask::cpu
