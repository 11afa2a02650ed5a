#include "cpu/scores.h"

#include <cmath>
#include <cstring>

#include "cpu/dropout.h"
#include "cpu/words.h"

namespace anymask::cpu {
namespace {

double load_half(uint16_t raw) {
  const int exponent = (raw >> 10) & 31, mantissa = raw & 1023;
  const double sign = (raw & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31) return sign * (mantissa == 0 ? INFINITY : NAN);
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

template <class T>
T load_as(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}

double load_number(const Tensor& t, int64_t element) {
  const char* at = static_cast<const char*>(t.data) + element * size_of(t.dtype);
  switch (t.dtype) {
    case DType::f64:
      return load_as<double>(at);
    case DType::f16:
      return load_half(load_as<uint16_t>(at));
    case DType::bf16: {
      const uint32_t bits = static_cast<uint32_t>(load_as<uint16_t>(at)) << 16;
      return load_as<float>(&bits);
    }
    default:
      return load_as<float>(at);
  }
}

// The step of a dimension, 0 where a single entry serves all.
int64_t step(const Tensor& t, int dimension) {
  return t.shape[dimension] == 1 ? 0 : t.stride[dimension];
}

// Copies elements of a row: those of the tile's keys, one after the other.
template <class E>
void gather(const char* from, int64_t stride, const TileKeys& keys, char* to) {
  for (int i = 0; i < keys.count; ++i) {
    std::memcpy(to + static_cast<size_t>(i) * sizeof(E),
                from + keys.key(i) * stride * static_cast<int64_t>(sizeof(E)), sizeof(E));
  }
}

}  // namespace

TileScores::TileScores(const ScoreOptions& options, const Tensor& q, plan::TileShape tile)
    : options_(options), q_heads_(q.shape[2]) {
  if (options.dropout_p > 0) {
    threshold_ = rules::dropout_threshold(options.dropout_p);
    const char* at = static_cast<const char*>(options.seed_offset.data);
    seed_ = load_as<int64_t>(at);
    offset_ = load_as<int64_t>(at + sizeof(int64_t));
  }
  const Tensor &bias = options.bias, &key_bias = options.key_bias, &sink = options.sink;
  if (sink.given()) {
    for (int64_t h = 0; h < q_heads_; ++h) sinks_.push_back(load_number(sink, h * sink.stride[0]));
  }
  any_ = options.softcap > 0 || bias.given() || key_bias.given() || sink.given() || drops();
  wide_ = bias.given() && bias.dtype != q.dtype;
  const int64_t pairs = static_cast<int64_t>(tile.rows) * tile.columns;
  const int64_t sum_size = q.dtype == DType::f64 ? 8 : 4;
  const auto pages = [](bool needed, int64_t bytes) {
    return needed ? page_up(static_cast<size_t>(bytes)) : 0;
  };
  sums_bytes_ = pages(bias.given() || key_bias.given(), pairs * sum_size);
  gathered_bytes_ = pages(bias.given(), pairs * size_of(bias.dtype));
  keys_bytes_ = pages(key_bias.given(), tile.columns * 8);
  bytes_ = sums_bytes_ + gathered_bytes_ + keys_bytes_ + pages(drops(), kTileWords * 4);
}

bool TileScores::groups_may_share(int64_t group) const {
  const Tensor& t = options_.key_bias;
  return !drops() && (!t.given() || q_heads_ / t.shape[1] % group == 0);
}

ScoreChanges TileScores::changes(char* memory) const {
  return {.any = any_,
          .softcap = options_.softcap,
          .keep_scale = rules::dropout_scale(threshold_),
          .biases = sums_bytes_ > 0 ? memory : nullptr};
}

RowsIn TileScores::pairs_of(const TileKeys& keys, int64_t head, int64_t row, int rows,
                            bool heads_are_rows, char* gathered) const {
  const Tensor& t = options_.bias;
  if (!t.given()) return {nullptr, 0};
  const int64_t size = size_of(t.dtype), stride = step(t, heads_are_rows ? 1 : 2);
  const char* first = static_cast<const char*>(t.data) +
                      (keys.batch * step(t, 0) + head * step(t, 1) + row * step(t, 2)) * size;
  const int64_t along = step(t, 3);
  if (along == 1 && !keys.reordered()) return {first + keys.first * size, stride};
  for (int r = 0; r < rows; ++r) {
    const char* from = first + r * stride * size;
    char* to = gathered + static_cast<int64_t>(r) * keys.count * size;
    size == 2   ? gather<uint16_t>(from, along, keys, to)
    : size == 4 ? gather<float>(from, along, keys, to)
                : gather<double>(from, along, keys, to);
  }
  return {gathered, keys.count};
}

const double* TileScores::keys_of(const TileKeys& keys, int64_t head, double* values) const {
  const Tensor& t = options_.key_bias;
  if (!t.given()) return nullptr;
  const int64_t first = keys.batch * step(t, 0) + head / (q_heads_ / t.shape[1]) * step(t, 1);
  for (int i = 0; i < keys.count; ++i) {
    values[i] = load_number(t, first + keys.key(i) * step(t, 2));
  }
  return values;
}

TileBiases TileScores::biases(const TileKeys& keys, int64_t head, int64_t row, int rows,
                              bool heads_are_rows, char* memory) const {
  char* gathered = memory + sums_bytes_;
  return {.pairs = pairs_of(keys, head, row, rows, heads_are_rows, gathered),
          .wide = wide_,
          .keys = keys_of(keys, head, reinterpret_cast<double*>(gathered + gathered_bytes_))};
}

Words TileScores::kept(const TileKeys& keys, int64_t head, int64_t row, int rows,
                       char* memory) const {
  if (!drops()) return {nullptr, 0};
  auto* words = reinterpret_cast<uint32_t*>(memory + sums_bytes_ + gathered_bytes_ + keys_bytes_);
  const rules::Dropout dropout =
      rules::dropout_of(seed_, offset_, static_cast<int>(keys.batch), static_cast<int>(head),
                        rules::digits_of(threshold_));
  kept_words(dropout, keys, row, rows, words);
  return {words, kWordsStride};
}

}  // namespace anymask::cpu
