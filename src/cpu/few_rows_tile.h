// Forward for a few query rows, as in decoding: the kernel of forward_tile.h would leave most of
// its lanes, which are rows, empty.
//
// Scores: lanes are kLanes keys, whose items are transposed a square at a time. So a score is the
// same sum in the same order as there, and in the backward pass, whose P would else suffer where
// scores are large. Output: lanes are values. Memory is what this waits for: rows of keys and
// values are read once.
#pragma once

#include "cpu/forward_tile.h"
#include "cpu/rows.h"

namespace anymask::cpu::ANYMASK_ISA {

// Up to half of the lanes: 8 rows of bf16 over 1024 keys, 8 heads, D = 128, take 383 us with
// AVX-512, where rows in the lanes, be they 9 or 16, take 530 (benchmarks/decoding.py).
template <class Math>
inline constexpr int kMostFewRows = kLanesOf<Math> / 2 < kFewRows ? kLanesOf<Math> / 2 : kFewRows;

template <class Math>
struct FewRowsScratch {
  using T = typename Math::T;
  using Item = typename Math::Item;
  Item* q;     // [row][item], zeros up to whole vectors
  T* out;      // [row][d], not yet divided by `sum`
  T* highest;  // row maxima of the raw scores so far
  T* sum;      // row sums of exp2(score - highest)
  T* scores;   // [row][key]
  int q_stride, out_stride, score_stride;
  size_t bytes;

  ANYMASK_INLINE FewRowsScratch(void* scratch, int tile_keys, int head_dim, int v_head_dim)
      : q_stride(round_up(head_dim / Math::kPair, kLanesOf<Math>)),
        out_stride(round_up(v_head_dim, kLanesOf<Math>)),
        score_stride(round_up(tile_keys, kLanesOf<Math>)) {
    Arena arena{static_cast<char*>(scratch)};
    q = arena.take<Item>(kFewRows * q_stride);
    out = arena.take<T>(kFewRows * out_stride);
    highest = arena.take<T>(kFewRows);
    sum = arena.take<T>(kFewRows);
    scores = arena.take<T>(kFewRows * score_stride);
    bytes = static_cast<size_t>(arena.at - static_cast<char*>(scratch));
  }
};

// The scores of kLanes keys (of `keys`; behind the last one, its own again) and kRows rows.
template <class Math, class In, int kRows, bool kWhole>
ANYMASK_INLINE void scores_of_keys(const typename In::Raw* k, int64_t k_stride, int keys,
                                   const FewRowsScratch<Math>& scratch, int items,
                                   typename Math::Vec (&scores)[kRows]) {
  using Items = typename Math::Items;
  constexpr int kLanes = kLanesOf<Math>;
  const auto add = [&](int item, int count) {
    Items square[kLanes];
    ANYMASK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = kWhole || i < keys ? i : keys - 1;
      square[i] = load_items<Math, In>(k + at * k_stride + item * Math::kPair, count);
    }
    transpose(square);
    ANYMASK_UNROLL
    for (int i = 0; i < kLanes; ++i) {  // what there is not is 0 in both
      ANYMASK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Items q = splat<Items>(scratch.q[r * scratch.q_stride + item + i]);
        scores[r] = Math::multiply_add(q, square[i], scores[r]);
      }
    }
  };
  int item = 0;
  for (; item + kLanes <= items; item += kLanes) add(item, kLanes);
  if (item < items) add(item, items - item);
}

// Scores of all keys of a range, masked, in scratch; `highest`: per row, in the lanes. words: of
// its first key, or nullptr.
template <class Math, class In, int kRows>
ANYMASK_INLINE void score_keys(const typename In::Raw* k, int64_t k_stride, int keys,
                               const FewRowsScratch<Math>& scratch, int head_dim,
                               const uint32_t* words, typename Math::Vec (&highest)[kFewRows]) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  const auto hidden = splat<Vec>(-static_cast<T>(__builtin_inf()));
  const int items = head_dim / Math::kPair;
  for (int key = 0; key < keys; key += kLanes) {
    const int count = keys - key < kLanes ? keys - key : kLanes;
    const typename In::Raw* at = k + key * k_stride;
    Vec scores[kRows] = {};
    if (count == kLanes) {
      scores_of_keys<Math, In, kRows, true>(at, k_stride, count, scratch, items, scores);
    } else {
      scores_of_keys<Math, In, kRows, false>(at, k_stride, count, scratch, items, scores);
    }
    ANYMASK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (words != nullptr) scores[r] = select_words(words + key, r, scores[r], hidden);
      if (count < kLanes) scores[r] = select_bits((1u << count) - 1, scores[r], hidden);
      highest[r] = maximum(scores[r], highest[r]);
      store(scratch.scores + r * scratch.score_stride + key, scores[r]);
    }
  }
}

template <class Vec>
ANYMASK_INLINE typename Lanes<Vec>::T largest_lane(Vec x) {
  typename Lanes<Vec>::T largest = x[0];
  for (int i = 1; i < Lanes<Vec>::kCount; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Adds `count` columns of the values of `keys` keys, times their weights, to the output of kRows
// rows, whose older sums are multiplied with keep[row]: kCount whole vectors of columns, or one
// with fewer.
template <class Math, class In, int kRows, int kCount>
ANYMASK_INLINE void add_columns(const typename In::Raw* v, int64_t v_stride, int keys, int count,
                                const FewRowsScratch<Math>& scratch, int column,
                                const typename Math::T (&keep)[kFewRows]) {
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  Vec sums[kRows][kCount] = {};
  for (int i = 0; i < keys; ++i) {
    ANYMASK_UNROLL
    for (int n = 0; n < kCount; ++n) {
      const Vec value = load_as<In>(v + i * v_stride + column + n * kLanes, count);
      ANYMASK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r][n] += splat<Vec>(scratch.scores[r * scratch.score_stride + i]) * value;
      }
    }
  }
  ANYMASK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ANYMASK_UNROLL
    for (int n = 0; n < kCount; ++n) {
      auto* to = scratch.out + r * scratch.out_stride + column + n * kLanes;
      store(to, load<Vec>(to) * splat<Vec>(keep[r]) + sums[r][n]);
    }
  }
}

// kAtOnce: as many whole vectors of columns are taken at a time, then half as many, and so on.
template <class Math, class In, int kRows, int kAtOnce>
ANYMASK_INLINE void add_values(const typename In::Raw* v, int64_t v_stride, int keys, int columns,
                               const FewRowsScratch<Math>& scratch, int column,
                               const typename Math::T (&keep)[kFewRows]) {
  constexpr int kLanes = kLanesOf<Math>;
  for (; column + kAtOnce * kLanes <= columns; column += kAtOnce * kLanes) {
    add_columns<Math, In, kRows, kAtOnce>(v, v_stride, keys, kLanes, scratch, column, keep);
  }
  if constexpr (kAtOnce > 1) {
    add_values<Math, In, kRows, kAtOnce / 2>(v, v_stride, keys, columns, scratch, column, keep);
  } else if (column < columns) {
    add_columns<Math, In, kRows, 1>(v, v_stride, keys, columns - column, scratch, column, keep);
  }
}

// kRows: job.rows or a little more.
template <class Math, class In, int kRows>
ANYMASK_INLINE void few_rows_step(const ForwardJob& job, const KeyTile& tile, int begin, int end) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  using Raw = typename In::Raw;
  constexpr int kLanes = kLanesOf<Math>;
  const FewRowsScratch<Math> scratch(job.scratch, job.tile_keys, job.head_dim, job.v_head_dim);
  const auto* k = static_cast<const Raw*>(tile.k.data) + begin * tile.k.stride;
  const auto* v = static_cast<const Raw*>(tile.v.data) + begin * tile.v.stride;
  const uint32_t* words = tile.words.data == nullptr ? nullptr : tile.words.data + begin;
  const int keys = end - begin;

  Vec highest[kFewRows];
  for (int r = 0; r < kRows; ++r) highest[r] = splat<Vec>(scratch.highest[r]);
  score_keys<Math, In, kRows>(k, tile.k.stride, keys, scratch, job.head_dim, words, highest);

  const auto factor = exp2_factor<T>(job.changes, job.scale);
  T keep[kFewRows] = {};
  for (int r = 0; r < job.rows; ++r) {
    const T before = scratch.highest[r], now = largest_lane(highest[r]);
    // Rows that have seen no key yet: their maximum is -inf, and -inf - -inf is NaN.
    const T shift = now == -static_cast<T>(__builtin_inf()) ? T{} : now * factor;
    keep[r] = exp2_of(splat<Vec>(before * factor - shift))[0];
    Vec sum{};
    for (int key = 0; key < keys; key += kLanes) {
      T* at = scratch.scores + r * scratch.score_stride + key;
      const Vec weights = exp2_of(load<Vec>(at) * splat<Vec>(factor) - splat<Vec>(shift));
      store(at, weights);
      sum += weights;
    }
    scratch.highest[r] = now;
    scratch.sum[r] = scratch.sum[r] * keep[r] + sum_of_lanes(sum);
  }

  // As many sums as hide the latency of adding to them, and as registers allow.
  constexpr int kAtOnce = (kBlock > 6 ? 16 : 8) / (kRows > 1 ? kRows : 2);
  add_values<Math, In, kRows, kAtOnce>(v, tile.v.stride, keys, job.v_head_dim, scratch, 0, keep);
}

// The step for as few rows as there are, of 1, 2, 4 and 8.
template <class Math, class In, int kRows>
ANYMASK_INLINE void step_of_rows(const ForwardJob& job, const KeyTile& tile, int begin, int end) {
  if constexpr (2 * kRows <= kMostFewRows<Math>) {
    if (job.rows > kRows) return step_of_rows<Math, In, 2 * kRows>(job, tile, begin, end);
  }
  few_rows_step<Math, In, kRows>(job, tile, begin, end);
}

template <class Math, class In>
void few_rows_tile(const ForwardJob& job, const KeyTile& tile) {
  int begin = 0, end = tile.keys;
  if (tile.words.data != nullptr) {
    visible_range<Math>(tile.words, 0, tile.keys, &begin, &end);
    if (begin >= end) return;
  }
  step_of_rows<Math, In, 1>(job, tile, begin, end);
}

template <class Math, class In>
void few_rows_begin(const ForwardJob& job) {
  using T = typename Math::T;
  using Items = typename Math::Items;
  const FewRowsScratch<Math> scratch(job.scratch, job.tile_keys, job.head_dim, job.v_head_dim);
  pack_rows<Math, In>(static_cast<const typename In::Raw*>(job.q.data), job.q.stride, job.rows,
                      kFewRows, job.head_dim / Math::kPair, scratch.q, scratch.q_stride);
  if (job.scale < 0) {
    for (int i = 0; i < kFewRows * scratch.q_stride; i += kLanesOf<Math>) {
      store(scratch.q + i, negated<Math>(load<Items>(scratch.q + i)));
    }
  }
  for (int i = 0; i < kFewRows * scratch.out_stride; ++i) scratch.out[i] = T{};
  // Rows that do not exist keep these as their weights.
  for (int i = 0; i < kFewRows * scratch.score_stride; ++i) scratch.scores[i] = T{};
  for (int r = 0; r < kFewRows; ++r) {
    scratch.highest[r] = -static_cast<T>(__builtin_inf());
    scratch.sum[r] = T{};
  }
}

template <class Math, class In>
void few_rows_end(const ForwardJob& job, RowsOut out, void* lse) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  const FewRowsScratch<Math> scratch(job.scratch, job.tile_keys, job.head_dim, job.v_head_dim);
  for (int r = 0; r < job.rows; ++r) {
    // A row's largest score adds about 1 to its sum: 0 means that it saw nothing.
    const T sum = scratch.sum[r];
    T* from = scratch.out + r * scratch.out_stride;
    for (int d = 0; d < job.v_head_dim; d += kLanes) {
      store(from + d, load<Vec>(from + d) * splat<Vec>(sum == T{} ? T{} : 1 / sum));
    }
    static_cast<T*>(lse)[r] = lse_of(job, scratch.highest[r], sum);
  }
  round_rows<In>(scratch.out, scratch.out_stride, job.rows, job.v_head_dim, out);
}

template <class Math>
size_t few_rows_scratch_bytes(int, int tile_keys, int head_dim, int v_head_dim) {
  return FewRowsScratch<Math>(nullptr, tile_keys, head_dim, v_head_dim).bytes;
}

template <class Math, class In>
constexpr ForwardKernel few_rows_kernel() {
  return {few_rows_scratch_bytes<Math>, few_rows_begin<Math, In>, few_rows_tile<Math, In>,
          few_rows_end<Math, In>};
}

}  // namespace anymask::cpu::ANYMASK_ISA
