// Backward: one key tile against row tiles, five products each.
//
// Lanes are keys for S = Q K^T and dP = dO V^T (K^T and V^T packed once per key tile; P needs no
// reduction, the forward pass left its lse) and head dimensions for dV += P^T dO, dK += dS^T Q and
// dQ = dS K. P and dS of a strip of keys lie as [row][key], so they are read by broadcasts either
// way. The unit that a mask skips is a group of 32 rows x a strip of keys.
#pragma once

#include "cpu/backward_weights.h"
#include "cpu/rows.h"

namespace anymask::cpu::ANYMASK_ISA {

// Which units of a tile have work, and whether they need their bits.
struct Units {
  int groups, strips;
  uint8_t state[kMaxTileRows / kGroupRows][kMaxTileKeys / 4];  // 0 nothing, 1 all, 2 some
};

template <class Math>
inline void find_units(const Words& words, int rows, int keys, Units* units) {
  constexpr int kWidth = kStrip<Math>;
  units->groups = round_up(rows, kGroupRows) / kGroupRows;
  units->strips = round_up(keys, kWidth) / kWidth;
  for (int g = 0; g < units->groups; ++g) {
    for (int s = 0; s < units->strips; ++s) {
      uint32_t any = 0xffffffffu, every = 0xffffffffu;
      if (words.data != nullptr) {
        any = 0;
        for (int i = 0; i < kWidth; ++i) {
          const uint32_t word = words.data[g * words.stride + s * kWidth + i];
          any |= word;
          every &= word;
        }
      }
      units->state[g][s] = any == 0 ? 0 : every == 0xffffffffu ? 1 : 2;
    }
  }
}

// to[m][n] += sum over rows of p(row, key m) * b[row][n]: dV and dK.
template <class Math, int N>
struct AddTransposed {
  using Item = typename Math::Item;
  const Units& units;
  int strip;
  const Item* p;  // of the strip
  const Item* b;
  int64_t b_stride;
  typename Math::T* to;
  int64_t to_stride;

  template <int M>
  ANYMASK_INLINE void run(int key) const {
    constexpr int kDepth = kGroupRows / Math::kPair;
    constexpr int64_t kItem = sizeof(Item);
    Block<Math, M, N> acc;
    clear(acc);
    for (int g = 0; g < units.groups; ++g) {
      if (units.state[g][strip] == 0) continue;
      multiply(acc, p + static_cast<int64_t>(g) * kDepth * kStrip<Math> + key, kItem,
               kStrip<Math> * kItem, b + g * kDepth * b_stride, b_stride, kDepth);
    }
    add_block(acc, to + key * to_stride, to_stride);
    store_block(acc, to + key * to_stride, to_stride);
  }
};

// dq[row][n] = sum over keys of ds(row, key) * k[key][n].
template <class Math, int N>
struct MakeDq {
  using Item = typename Math::Item;
  const Units& units;
  const Item* ds;  // [strip][row][item]
  int64_t ds_strip;
  const Item* k;
  int64_t k_stride;
  typename Math::T* to;
  int64_t to_stride;

  template <int M>
  ANYMASK_INLINE void run(int row) const {
    constexpr int kDepth = kStrip<Math> / Math::kPair;
    constexpr int64_t kItem = sizeof(Item);
    Block<Math, M, N> acc;
    clear(acc);
    for (int s = 0; s < units.strips; ++s) {
      if (units.state[row / kGroupRows][s] == 0) continue;
      multiply(acc, ds + s * ds_strip + static_cast<int64_t>(row) * kDepth, kDepth * kItem, kItem,
               k + s * kDepth * k_stride, k_stride, kDepth);
    }
    store_block(acc, to + row * to_stride, to_stride);
  }
};

// Calls body(first column, N) for blocks of kVectors and then single vectors of columns.
template <class Math, class Wide, class Single>
ANYMASK_INLINE void for_columns(int columns, const Wide& wide, const Single& single) {
  int n = 0;
  for (; n + kStrip<Math> - kLanesOf<Math> < columns; n += kStrip<Math>) wide(n);
  for (; n < columns; n += kLanesOf<Math>) single(n);
}

template <class Math>
inline void add_transposed(const BackwardScratch<Math>& scratch, const Units& units,
                           const typename Math::Item* p, const typename Math::Item* b,
                           int64_t b_stride, int columns, typename Math::T* to, int64_t to_stride) {
  for (int strip = 0; strip < units.strips; ++strip) {
    const auto* strip_p =
        p + static_cast<int64_t>(strip) * (scratch.rows / Math::kPair) * kStrip<Math>;
    auto* strip_to = to + strip * kStrip<Math> * to_stride;
    for_columns<Math>(
        columns,
        [&](int n) {
          for_blocks_in<kStrip<Math>>(
              0, AddTransposed<Math, kVectors>{units, strip, strip_p, b + n, b_stride, strip_to + n,
                                               to_stride});
        },
        [&](int n) {
          for_blocks_in<kStrip<Math>>(0, AddTransposed<Math, 1>{units, strip, strip_p, b + n,
                                                                b_stride, strip_to + n, to_stride});
        });
  }
}

template <class Math, class In>
void backward_begin(const BackwardJob& job) {
  using T = typename Math::T;
  using Raw = typename In::Raw;
  const auto scratch = scratch_of<Math>(job);
  const Raw* k = static_cast<const Raw*>(job.k.data);
  const Raw* v = static_cast<const Raw*>(job.v.data);
  const int strips = round_up(job.keys, kStrip<Math>) / kStrip<Math>;
  const int keys = strips * kStrip<Math>;
  pack_transposed<Math, In>(k, job.k.stride, job.keys, strips, scratch.q_items, job.scale < 0,
                            scratch.k_columns);
  pack_transposed<Math, In>(v, job.v.stride, job.keys, strips, scratch.v_items, false,
                            scratch.v_columns);
  pack_depth<Math, In>(k, job.k.stride, job.keys, keys, job.head_dim, scratch.k_depth,
                       scratch.dq_stride);
  for (int64_t i = 0; i < static_cast<int64_t>(keys) * scratch.dq_stride; ++i) scratch.dk[i] = T{};
  for (int64_t i = 0; i < static_cast<int64_t>(keys) * scratch.dv_stride; ++i) scratch.dv[i] = T{};
}

// Words of unit (g, s).
template <class Math>
ANYMASK_INLINE const uint32_t* unit_words(const Words& words, int g, int s) {
  return words.data == nullptr ? nullptr : words.data + g * words.stride + s * kStrip<Math>;
}

// Calls unit(weights) with what the job makes of the scores of unit (g, s), unless nothing is
// visible there.
template <class Math, class Unit>
inline void changed_unit(const BackwardJob& job, const RowTile& tile,
                         const BackwardScratch<Math>& scratch, int g, int s, bool empty,
                         const uint32_t* words, const Unit& unit) {
  using T = typename Math::T;
  const ScoreChanges& changes = job.changes;
  T* biases = static_cast<T*>(changes.biases);
  T* dlogits = static_cast<T*>(job.dlogits);
  if (biases != nullptr) biases += s * kStrip<Math>;
  if (dlogits != nullptr) dlogits += s * kStrip<Math>;
  if (!empty) {
    return unit(ChangedWeights<Math>{scratch, Capping<typename Math::Vec>(changes, job.scale),
                                     static_cast<T>(job.scale), static_cast<T>(changes.keep_scale),
                                     words, unit_words<Math>(tile.kept, g, s), biases, dlogits,
                                     job.tile_keys});
  }
  for (int r = g * kGroupRows; dlogits != nullptr && r < (g + 1) * kGroupRows; ++r) {
    for (int i = 0; i < kStrip<Math>; ++i) dlogits[r * job.tile_keys + i] = T{};
  }
}

template <class Math, class In>
void backward_tile(const BackwardJob& job, const RowTile& tile) {
  using T = typename Math::T;
  using Raw = typename In::Raw;
  const auto scratch = scratch_of<Math>(job);
  Units units;
  find_units<Math>(tile.words, tile.rows, job.keys, &units);
  const int rows = units.groups * kGroupRows;

  const Raw* q = static_cast<const Raw*>(tile.q.data);
  const Raw* dout = static_cast<const Raw*>(tile.dout.data);
  pack_rows<Math, In>(q, tile.q.stride, tile.rows, rows, scratch.q_items, scratch.q,
                      scratch.q_stride);
  pack_rows<Math, In>(dout, tile.dout.stride, tile.rows, rows, scratch.v_items, scratch.dout,
                      scratch.v_stride);
  if constexpr (Math::kPair == 2) {
    pack_depth<Math, In>(q, tile.q.stride, tile.rows, rows, job.head_dim, scratch.q_depth,
                         scratch.dq_stride);
    pack_depth<Math, In>(dout, tile.dout.stride, tile.rows, rows, job.v_head_dim,
                         scratch.dout_depth, scratch.dv_stride);
  }
  const T infinity = static_cast<T>(__builtin_inff());
  for (int r = 0; r < rows; ++r) {
    const T lse = r < tile.rows ? static_cast<const T*>(tile.lse)[r] : -infinity;
    scratch.shift[r] = lse == -infinity ? infinity : lse * static_cast<T>(kLog2E);
    scratch.delta[r] = r < tile.rows ? static_cast<const T*>(tile.delta)[r] : T{};
  }

  const T factor = exponent_factor<T>(job.scale);
  const T scale = static_cast<T>(job.scale);
  if (job.changes.biases != nullptr) {
    pack_biases_by_row<Math, In>(tile.biases, tile.rows, rows, job.keys,
                                 static_cast<T*>(job.changes.biases), job.tile_keys);
  }

  for (int s = 0; s < units.strips; ++s) {
    const auto share = [&](const void* data, int64_t stride, int columns, int64_t size) {
      return Ahead::share(data, stride, columns, size, s, units.strips);
    };
    const Ahead next_q = share(tile.next_q, tile.q.stride, job.head_dim, sizeof(Raw));
    const Ahead next_dout = share(tile.next_dout, tile.dout.stride, job.v_head_dim, sizeof(Raw));
    const Ahead dq = share(tile.dq.data, tile.dq.stride, job.head_dim, sizeof(T));
    for (int g = 0; g < units.groups; ++g) {
      const auto unit = [&]<class Weights>(const Weights& weights) {
        for_blocks_in<kGroupRows>(g * kGroupRows, Probabilities<Math, Weights>{
                                                      scratch, s, weights, next_q, next_dout, dq});
      };
      const int state = units.state[g][s];
      const uint32_t* words = state == 2 ? unit_words<Math>(tile.words, g, s) : nullptr;
      if (job.changes.any) {
        changed_unit<Math>(job, tile, scratch, g, s, state == 0, words, unit);
      } else if (state == 1) {
        unit(PlainWeights<Math, false>{scratch, factor, scale, nullptr});
      } else if (state == 2) {
        unit(PlainWeights<Math, true>{scratch, factor, scale, words});
      }
    }
  }

  add_transposed<Math>(scratch, units, scratch.p, scratch.dout_depth,
                       Math::kPair == 1 ? scratch.v_stride : scratch.dv_stride, job.v_head_dim,
                       scratch.dv, scratch.dv_stride);
  add_transposed<Math>(scratch, units, scratch.ds, scratch.q_depth,
                       Math::kPair == 1 ? scratch.q_stride : scratch.dq_stride, job.head_dim,
                       scratch.dk, scratch.dq_stride);

  const int64_t ds_strip = static_cast<int64_t>(scratch.rows) * kStrip<Math> / Math::kPair;
  for_columns<Math>(
      job.head_dim,
      [&](int n) {
        const MakeDq<Math, kVectors> body{
            units,          scratch.ds_rows,  ds_strip, scratch.k_depth + n, scratch.dq_stride,
            scratch.dq + n, scratch.dq_stride};
        for (int g = 0; g < units.groups; ++g) {
          for_blocks_in<kGroupRows>(g * kGroupRows, body);
        }
      },
      [&](int n) {
        const MakeDq<Math, 1> body{
            units,          scratch.ds_rows,  ds_strip, scratch.k_depth + n, scratch.dq_stride,
            scratch.dq + n, scratch.dq_stride};
        for (int g = 0; g < units.groups; ++g) {
          for_blocks_in<kGroupRows>(g * kGroupRows, body);
        }
      });
}

template <class Math>
void add_dq(const BackwardJob& job, int rows, bool first, RowsOut sum) {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  constexpr int kLanes = kLanesOf<Math>;
  const auto scratch = scratch_of<Math>(job);
  for (int r = 0; r < rows; ++r) {
    T* to = static_cast<T*>(sum.data) + r * sum.stride;
    const T* from = scratch.dq + static_cast<int64_t>(r) * scratch.dq_stride;
    for (int d = 0; d < job.head_dim; d += kLanes) {
      const int count = job.head_dim - d < kLanes ? job.head_dim - d : kLanes;
      Vec x = load<Vec>(from + d);
      if (!first) x += count == kLanes ? load<Vec>(to + d) : load_first<Vec>(to + d, count);
      if (count == kLanes) {
        store(to + d, x);
      } else {
        store_first(to + d, x, count);
      }
    }
  }
}

template <class Math, class In>
void round_dq(RowsIn sum, int rows, int head_dim, RowsOut dq) {
  round_rows<In>(static_cast<const typename Math::T*>(sum.data), sum.stride, rows, head_dim, dq);
}

template <class Math, class In>
void backward_end(const BackwardJob& job, RowsOut dk, RowsOut dv) {
  const auto scratch = scratch_of<Math>(job);
  round_rows<In>(scratch.dk, scratch.dq_stride, job.keys, job.head_dim, dk);
  round_rows<In>(scratch.dv, scratch.dv_stride, job.keys, job.v_head_dim, dv);
}

template <class Math>
size_t backward_scratch_bytes(int tile_rows, int tile_keys, int head_dim, int v_head_dim) {
  return BackwardScratch<Math>(nullptr, tile_rows, tile_keys, head_dim, v_head_dim).bytes;
}

template <class Math, class In>
constexpr BackwardKernel backward_kernel() {
  return {backward_scratch_bytes<Math>,
          backward_begin<Math, In>,
          backward_tile<Math, In>,
          add_dq<Math>,
          backward_end<Math, In>,
          round_dq<Math, In>,
          row_delta<In>};
}

}  // namespace anymask::cpu::ANYMASK_ISA
