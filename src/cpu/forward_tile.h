// Forward: one query tile against its key tiles, one after the other (online softmax).
//
// Lanes are query rows. A strip of rows (32 with AVX-512) lies transposed in kVectors registers'
// lanes, keys are broadcast: S^T[key][row] = K x Q^T, so that the softmax's maxima and sums over
// keys are plain vector arithmetic, a key column's mask word is a lane mask, and P^T is at once the
// right operand of O^T[d][row] += V^T x P^T. A strip's Q^T, S^T and O^T take 8 to 16 KB each and
// stay in L1 while keys stream past from L2.
#pragma once

#include "cpu/kernels.h"
#include "cpu/packing.h"
#include "cpu/score_tile.h"

namespace anymask::cpu::ANYMASK_ISA {

template <class Math>
struct ForwardScratch {
  using T = typename Math::T;
  using Item = typename Math::Item;
  Item* q;     // Q^T [strip][item][row]
  T* out;      // O^T [strip][d][row], not yet divided by `sum`
  T* highest;  // row maxima of the raw scores (or logits) so far
  T* sum;      // row sums of exp2(score - highest)
  T* scores;   // S^T, then P^T [key][row] of one strip
  Item* k;     // packed keys, where they are not read straight from the caller's memory
  Item* v;
  int strips, q_items, k_stride, v_stride;
  size_t bytes;

  ANYMASK_INLINE ForwardScratch(void* scratch, int tile_rows, int tile_keys, int head_dim,
                                int v_head_dim)
      : strips(round_up(tile_rows, kStrip<Math>) / kStrip<Math>),
        q_items(head_dim / Math::kPair),
        k_stride(padded<Math>(q_items)),
        v_stride(padded<Math>(v_head_dim)) {
    Arena arena{static_cast<char*>(scratch)};
    const int64_t rows = strips * kStrip<Math>;
    q = arena.take<Item>(rows * q_items);
    out = arena.take<T>(rows * v_head_dim);
    highest = arena.take<T>(rows);
    sum = arena.take<T>(rows);
    scores = arena.take<T>(static_cast<int64_t>(tile_keys + 1) * kStrip<Math>);
    k = arena.take<Item>(static_cast<int64_t>(tile_keys) * k_stride);
    v = arena.take<Item>(static_cast<int64_t>(tile_keys / Math::kPair + 1) * v_stride);
    bytes = static_cast<size_t>(arena.at - static_cast<char*>(scratch));
  }
};

template <class Math, int N, bool kMasked>
struct ScoresOf {
  using Vec = typename Math::Vec;
  const char* k;  // the first key of the strip's range
  int64_t k_step;
  const typename Math::Item* q;
  int q_items;
  const uint32_t* words;  // of the first key
  int word_shift;
  typename Math::T* scores;
  Vec* highest;
  Ahead next_k, next_v;

  template <int M>
  ANYMASK_INLINE void run(int key) const {
    next_k.fetch(key, M);
    next_v.fetch(key, M);
    Block<Math, M, N> acc;
    clear(acc);
    multiply(acc, k + key * k_step, k_step, sizeof(typename Math::Item), q, kStrip<Math>, q_items);
    ANYMASK_UNROLL
    for (int m = 0; m < M; ++m) {
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) {
        if constexpr (kMasked) {
          const uint32_t word = words[key + m] >> (word_shift + n * kLanesOf<Math>);
          const auto hidden = splat<Vec>(-__builtin_inff());
          acc.at[m][n] = select_bits(word, acc.at[m][n], hidden);
        }
        highest[n] = maximum(acc.at[m][n], highest[n]);
      }
    }
    store_block(acc, scores + static_cast<int64_t>(key) * kStrip<Math>, kStrip<Math>);
  }
};

template <class Math, int N>
struct AddValues {
  using Vec = typename Math::Vec;
  const char* v;
  int64_t v_step;
  const typename Math::Item* p;
  int depth;
  typename Math::T* out;
  const Vec* keep;  // what the older sums are multiplied with

  template <int M>
  ANYMASK_INLINE void run(int d) const {
    Block<Math, M, N> acc;
    typename Math::T* to = out + static_cast<int64_t>(d) * kStrip<Math>;
    clear(acc);
    constexpr int64_t kItem = sizeof(typename Math::Item);
    multiply(acc, v + d * kItem, kItem, v_step, p, kStrip<Math>, depth);
    // The tile's sum is made on its own and then added: the rounding error grows with the square
    // root of the number of tiles, not of keys.
    ANYMASK_UNROLL
    for (int m = 0; m < M; ++m) {
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec older = load<Vec>(to + m * kStrip<Math> + n * kLanesOf<Math>);
        acc.at[m][n] = older * keep[n] + acc.at[m][n];
      }
    }
    store_block(acc, to, kStrip<Math>);
  }
};

// Scores to probabilities in place (bf16: pairs of keys), and their sums per row.
template <class Math, int N>
ANYMASK_INLINE void exponentiate(typename Math::T* scores, int keys, typename Math::T factor,
                                 const typename Math::Vec (&shift)[N],
                                 typename Math::Vec (&sum)[N]) {
  using Vec = typename Math::Vec;
  const Vec scale = splat<Vec>(factor);
  const auto weight = [&](int key, int n) {
    const Vec s = load<Vec>(scores + static_cast<int64_t>(key) * kStrip<Math> + n * kLanesOf<Math>);
    const Vec p = exp2_of(s * scale - shift[n]);
    sum[n] += p;
    return p;
  };
  if constexpr (Math::kPair == 1) {
    for (int key = 0; key < keys; ++key) {
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) {
        store(scores + static_cast<int64_t>(key) * kStrip<Math> + n * kLanesOf<Math>,
              weight(key, n));
      }
    }
  } else {
    // Pair i overwrites row i, which lies at or before the rows 2 i and 2 i + 1 that it is made of.
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scores);
    for (int key = 0; key < keys; key += 2) {
      Vec low[N], high[N];
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) {
        low[n] = weight(key, n);
        high[n] = key + 1 < keys ? weight(key + 1, n) : Vec{};
      }
      ANYMASK_UNROLL
      for (int n = 0; n < N; ++n) {
        store(pairs + static_cast<int64_t>(key / 2) * kStrip<Math> + n * kLanesOf<Math>,
              pairs_of(low[n], high[n]));
      }
    }
  }
}

// Keys of a tile that a strip works on, from where they lie.
struct KeyRange {
  const char* k;
  int64_t k_step;
  const char* v;
  int64_t v_step;
  int begin, end;  // begin is even
  Ahead next_k, next_v;
};

// Words of a strip's rows from `key` on; its first row's bit is first_row % kGroupRows.
ANYMASK_INLINE const uint32_t* words_of(const Words& words, int first_row, int key) {
  return words.data + first_row / kGroupRows * words.stride + key;
}

template <class Math, int N, bool kMasked>
inline void strip_step(const ForwardScratch<Math>& scratch, const ForwardJob& job, int strip,
                       const KeyRange& range, const KeyTile& tile) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  const int first_row = strip * kStrip<Math>;
  const int keys = range.end - range.begin;
  const T factor = exp2_factor<T>(job.changes, job.scale);
  T* highest_at = scratch.highest + first_row;
  T* sum_at = scratch.sum + first_row;

  Vec before[N], highest[N];
  for (int n = 0; n < N; ++n) before[n] = highest[n] = load<Vec>(highest_at + n * kLanes);
  const ScoresOf<Math, N, kMasked> scores{
      range.k + range.begin * range.k_step,
      range.k_step,
      scratch.q + static_cast<int64_t>(first_row) * scratch.q_items,
      scratch.q_items,
      kMasked ? words_of(tile.words, first_row, range.begin) : nullptr,
      first_row % kGroupRows,
      scratch.scores,
      highest,
      range.next_k,
      range.next_v};
  for_blocks(0, keys, scores);
  if (job.changes.any) {
    const T* biases = static_cast<const T*>(job.changes.biases);
    if (biases != nullptr) biases += (strip * tile.keys + range.begin) * kStrip<Math>;
    make_logits<Math, N>(job.changes, job.scale, biases, keys, scratch.scores, highest_at);
    for (int n = 0; n < N; ++n) highest[n] = load<Vec>(highest_at + n * kLanes);
  }

  Vec shift[N], keep[N], sum[N];
  ANYMASK_UNROLL
  for (int n = 0; n < N; ++n) {
    store(highest_at + n * kLanes, highest[n]);
    // Rows that have seen no key yet: their maximum is -inf, and -inf - -inf is NaN.
    const Vec finite = highest[n] == splat<Vec>(-__builtin_inff()) ? Vec{} : highest[n];
    shift[n] = finite * factor;
    keep[n] = exp2_of(before[n] * factor - shift[n]);
    sum[n] = load<Vec>(sum_at + n * kLanes) * keep[n];
  }
  exponentiate<Math, N>(scratch.scores, keys, factor, shift, sum);
  for (int n = 0; n < N; ++n) store(sum_at + n * kLanes, sum[n]);
  if (tile.kept.data != nullptr) {
    drop_weights<Math, N>(words_of(tile.kept, first_row, range.begin), first_row % kGroupRows, keys,
                          scratch.scores);
  }

  const AddValues<Math, N> values{range.v + range.begin / Math::kPair * range.v_step,
                                  range.v_step,
                                  reinterpret_cast<const typename Math::Item*>(scratch.scores),
                                  (keys + Math::kPair - 1) / Math::kPair,
                                  scratch.out + static_cast<int64_t>(first_row) * job.v_head_dim,
                                  keep};
  for_blocks(0, job.v_head_dim, values);
}

// The keys that some row of the strip may see.
template <class Math>
ANYMASK_INLINE void visible_range(const Words& words, int strip, int keys, int* begin, int* end) {
  const int first_row = strip * kStrip<Math>;
  const uint32_t* word = words.data + first_row / kGroupRows * words.stride;
  const uint32_t ones = kStrip<Math> >= 32 ? 0xffffffffu : (1u << (kStrip<Math> % 32)) - 1u;
  const uint32_t rows = ones << (first_row % kGroupRows);
  int low = 0, high = keys;
  while (low < keys && (word[low] & rows) == 0) ++low;
  while (high > low && (word[high - 1] & rows) == 0) --high;
  *begin = low / 2 * 2;
  *end = high;
}

template <class Math, class In>
void forward_tile(const ForwardJob& job, const KeyTile& tile) {
  using Item = typename Math::Item;
  using Raw = typename In::Raw;
  const ForwardScratch<Math> scratch(job.scratch, job.tile_rows, job.tile_keys, job.head_dim,
                                     job.v_head_dim);
  const int strips = round_up(job.rows, kStrip<Math>) / kStrip<Math>;
  int begin[kMaxTileRows / 4], end[kMaxTileRows / 4];
  int least = tile.keys, most = 0;
  for (int strip = 0; strip < strips; ++strip) {
    begin[strip] = 0;
    end[strip] = tile.keys;
    if (tile.words.data != nullptr) {
      visible_range<Math>(tile.words, strip, tile.keys, &begin[strip], &end[strip]);
    }
    if (begin[strip] >= end[strip]) continue;
    least = begin[strip] < least ? begin[strip] : least;
    most = end[strip] > most ? end[strip] : most;
  }
  if (least >= most) return;

  const Raw* k = static_cast<const Raw*>(tile.k.data);
  const Raw* v = static_cast<const Raw*>(tile.v.data);
  // Rows that are items already are read where they lie: packing them costs 3%, even where rows a
  // power of two apart crowd into few cache sets.
  KeyRange range;
  if constexpr (sizeof(Raw) * Math::kPair == sizeof(Item)) {
    range.k = reinterpret_cast<const char*>(k);
    range.k_step = tile.k.stride * static_cast<int64_t>(sizeof(Raw));
  } else {
    pack_rows<Math, In>(k + least * tile.k.stride, tile.k.stride, most - least, most - least,
                        scratch.q_items, scratch.k + static_cast<int64_t>(least) * scratch.k_stride,
                        scratch.k_stride);
    range.k = reinterpret_cast<const char*>(scratch.k);
    range.k_step = scratch.k_stride * static_cast<int64_t>(sizeof(Item));
  }
  if constexpr (sizeof(Raw) == sizeof(Item)) {
    range.v = reinterpret_cast<const char*>(v);
    range.v_step = tile.v.stride * static_cast<int64_t>(sizeof(Raw));
  } else {
    pack_depth<Math, In>(v + least * tile.v.stride, tile.v.stride, most - least,
                         round_up(most - least, Math::kPair), job.v_head_dim,
                         scratch.v + static_cast<int64_t>(least / Math::kPair) * scratch.v_stride,
                         scratch.v_stride);
    range.v = reinterpret_cast<const char*>(scratch.v);
    range.v_step = scratch.v_stride * static_cast<int64_t>(sizeof(Item));
  }

  if (job.changes.biases != nullptr) {
    pack_biases_by_key<Math, In>(tile.biases, job.rows, tile.keys,
                                 static_cast<typename Math::T*>(job.changes.biases));
  }
  for (int strip = 0; strip < strips; ++strip) {
    if (begin[strip] >= end[strip]) continue;
    range.begin = begin[strip];
    range.end = end[strip];
    range.next_k =
        Ahead::share(tile.next_k, tile.k.stride, job.head_dim, sizeof(Raw), strip, strips);
    range.next_v =
        Ahead::share(tile.next_v, tile.v.stride, job.v_head_dim, sizeof(Raw), strip, strips);
    // Few rows, as in decoding: one register of lanes is enough.
    const bool narrow = job.rows - strip * kStrip<Math> <= kLanesOf<Math>;
    const bool masked = tile.words.data != nullptr;
    if (narrow) {
      masked ? strip_step<Math, 1, true>(scratch, job, strip, range, tile)
             : strip_step<Math, 1, false>(scratch, job, strip, range, tile);
    } else {
      masked ? strip_step<Math, kVectors, true>(scratch, job, strip, range, tile)
             : strip_step<Math, kVectors, false>(scratch, job, strip, range, tile);
    }
  }
}

template <class Math, class In>
void forward_begin(const ForwardJob& job) {
  using T = typename Math::T;
  const ForwardScratch<Math> scratch(job.scratch, job.tile_rows, job.tile_keys, job.head_dim,
                                     job.v_head_dim);
  const int strips = round_up(job.rows, kStrip<Math>) / kStrip<Math>;
  pack_transposed<Math, In>(static_cast<const typename In::Raw*>(job.q.data), job.q.stride,
                            job.rows, strips, scratch.q_items, job.scale < 0, scratch.q);
  const int64_t rows = static_cast<int64_t>(strips) * kStrip<Math>;
  for (int64_t i = 0; i < rows * job.v_head_dim; ++i) scratch.out[i] = T{};
  for (int64_t i = 0; i < rows; ++i) {
    // A sink counts in the sum like a key that has been seen, but adds no value.
    const bool sunk = job.sinks != nullptr && i < job.rows;
    scratch.highest[i] =
        sunk ? static_cast<T>(job.sinks[i * job.sink_stride]) : -static_cast<T>(__builtin_inff());
    scratch.sum[i] = scratch.highest[i] == -static_cast<T>(__builtin_inff()) ? T{} : T{1};
  }
}

ANYMASK_INLINE float natural_log(float x) { return __builtin_logf(x); }
ANYMASK_INLINE double natural_log(double x) { return __builtin_log(x); }

// The lse of a row whose scores' maximum is `highest`, and their sum of exp2 less it `sum`.
template <class T>
ANYMASK_INLINE T lse_of(const ForwardJob& job, T highest, T sum) {
  if (sum == T{}) return -static_cast<T>(__builtin_inff());
  const T to_natural =
      job.changes.any ? T{1} : static_cast<T>(exponent_factor<double>(job.scale) * kLn2);
  return highest * to_natural + natural_log(sum);
}

template <class Math, class In>
void forward_end(const ForwardJob& job, RowsOut out, void* lse) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  const ForwardScratch<Math> scratch(job.scratch, job.tile_rows, job.tile_keys, job.head_dim,
                                     job.v_head_dim);
  const Vec scale = splat<Vec>(static_cast<T>(job.changes.keep_scale));
  auto* to = static_cast<typename In::Raw*>(out.data);
  for (int first = 0; first < job.rows; first += kLanes) {
    const int rows = job.rows - first < kLanes ? job.rows - first : kLanes;
    const Vec sum = load<Vec>(scratch.sum + first);
    // A row's largest score adds about 1 to its sum: 0 means that it saw nothing.
    const Vec inverse = sum == Vec{} ? Vec{} : scale / sum;
    const T* from = scratch.out +
                    static_cast<int64_t>(first / kStrip<Math>) * kStrip<Math> * job.v_head_dim +
                    first % kStrip<Math>;
    for (int d = 0; d < job.v_head_dim; d += kLanes) {
      const int count = job.v_head_dim - d < kLanes ? job.v_head_dim - d : kLanes;
      Vec square[kLanes];
      ANYMASK_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < count
                        ? load<Vec>(from + static_cast<int64_t>(d + i) * kStrip<Math>) * inverse
                        : Vec{};
      }
      transpose(square);
      for (int r = 0; r < rows; ++r)
        store_as<In>(to + (first + r) * out.stride + d, square[r], count);
    }
    for (int r = 0; r < rows; ++r) {
      static_cast<T*>(lse)[first + r] =
          lse_of(job, scratch.highest[first + r], scratch.sum[first + r]);
    }
  }
}

template <class Math>
size_t forward_scratch_bytes(int tile_rows, int tile_keys, int head_dim, int v_head_dim) {
  return ForwardScratch<Math>(nullptr, tile_rows, tile_keys, head_dim, v_head_dim).bytes;
}

template <class Math, class In>
constexpr ForwardKernel forward_kernel() {
  return {forward_scratch_bytes<Math>, forward_begin<Math, In>, forward_tile<Math, In>,
          forward_end<Math, In>};
}

}  // namespace anymask::cpu::ANYMASK_ISA
