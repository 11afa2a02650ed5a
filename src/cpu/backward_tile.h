// Backward: one key tile against row tiles, five products each.
//
// Lanes are keys for S = Q K^T and dP = dO V^T (K^T and V^T packed once per key tile; P needs no
// reduction, the forward pass left its lse) and head dimensions for dV += P^T dO, dK += dS^T Q and
// dQ = dS K. P and dS of a strip of keys lie as [row][key], so they are read by broadcasts either
// way. The unit that a mask skips is a group of 32 rows x a strip of keys.
#pragma once

#include "cpu/kernels.h"
#include "cpu/packing.h"
#include "cpu/rows.h"

namespace anymask::cpu::ANYMASK_ISA {

template <class Math>
struct BackwardScratch {
  using T = typename Math::T;
  using Item = typename Math::Item;
  static constexpr int kPair = Math::kPair;

  // Once per key tile.
  Item* k_columns;  // K^T [strip][item][key]
  Item* v_columns;  // V^T
  Item* k_depth;    // K as dQ's right operand [key / pair][d]
  T* dk;            // [key][d]
  T* dv;
  // Once per row tile.
  Item* q;  // Q as S's left operand [row][item]
  Item* dout;
  Item* q_depth;  // Q as dK's right operand [row / pair][d]; without pairs the same as q
  Item* dout_depth;
  Item* p;        // [strip][row / pair][key]
  Item* ds;       // the same
  Item* ds_rows;  // dQ's left operand [strip][row][key / pair]; without pairs the same as ds
  T* dq;          // [row][d]
  T* shift;       // lse * log2(e), +inf for rows that see nothing
  T* delta;
  T* p_block;  // P of kBlock rows, not rounded

  int strips, rows, q_items, v_items, q_stride, v_stride, dq_stride, dv_stride;
  size_t bytes;

  ANYMASK_INLINE BackwardScratch(void* scratch, int tile_rows, int tile_keys, int head_dim,
                                 int v_head_dim)
      : strips(round_up(tile_keys, kStrip<Math>) / kStrip<Math>),
        rows(round_up(tile_rows, kGroupRows)),
        q_items(head_dim / kPair),
        v_items(v_head_dim / kPair),
        q_stride(padded<Math>(q_items)),
        v_stride(padded<Math>(v_items)),
        dq_stride(padded<Math>(head_dim)),
        dv_stride(padded<Math>(v_head_dim)) {
    Arena arena{static_cast<char*>(scratch)};
    const int64_t keys = static_cast<int64_t>(strips) * kStrip<Math>;
    k_columns = arena.take<Item>(keys * q_items);
    v_columns = arena.take<Item>(keys * v_items);
    k_depth = arena.take<Item>(keys / kPair * dq_stride);
    dk = arena.take<T>(keys * dq_stride);
    dv = arena.take<T>(keys * dv_stride);
    q = arena.take<Item>(static_cast<int64_t>(rows) * q_stride);
    dout = arena.take<Item>(static_cast<int64_t>(rows) * v_stride);
    q_depth = kPair == 1 ? q : arena.take<Item>(static_cast<int64_t>(rows) / kPair * dq_stride);
    dout_depth =
        kPair == 1 ? dout : arena.take<Item>(static_cast<int64_t>(rows) / kPair * dv_stride);
    p = arena.take<Item>(rows / kPair * keys);
    ds = arena.take<Item>(rows / kPair * keys);
    ds_rows = kPair == 1 ? ds : arena.take<Item>(rows * keys / kPair);
    dq = arena.take<T>(static_cast<int64_t>(rows) * dq_stride);
    shift = arena.take<T>(rows);
    delta = arena.take<T>(rows);
    p_block = arena.take<T>(kBlock * kStrip<Math>);
    bytes = static_cast<size_t>(arena.at - static_cast<char*>(scratch));
  }
};

template <class Math>
ANYMASK_INLINE BackwardScratch<Math> scratch_of(const BackwardJob& job) {
  return BackwardScratch<Math>(job.scratch, job.tile_rows, job.tile_keys, job.head_dim,
                               job.v_head_dim);
}

// P and dS of some rows x one strip of keys.
template <class Math, bool kMasked>
struct Probabilities {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  using Item = typename Math::Item;
  static constexpr int kLanes = kLanesOf<Math>;
  const BackwardScratch<Math>& scratch;
  int strip;
  T factor, scale;
  const uint32_t* words;  // of the group and strip
  Ahead next_q, next_dout, dq;

  template <int M>
  ANYMASK_INLINE void put(const Block<Math, M, kVectors>& block, int row, Item* to,
                          Item* to_rows) const {
    const int64_t strip_at = static_cast<int64_t>(strip) * scratch.rows * kStrip<Math>;
    if constexpr (Math::kPair == 1) {
      store_block(block, to + strip_at + static_cast<int64_t>(row) * kStrip<Math>, kStrip<Math>);
    } else {
      static_assert(M % 2 == 0);
      ANYMASK_UNROLL
      for (int m = 0; m < M; m += 2) {
        ANYMASK_UNROLL
        for (int n = 0; n < kVectors; ++n) {
          store(to + strip_at / 2 + static_cast<int64_t>((row + m) / 2) * kStrip<Math> + n * kLanes,
                pairs_of(block.at[m][n], block.at[m + 1][n]));
        }
        if (to_rows != nullptr) {
          static_assert(kVectors == 2);
          ANYMASK_UNROLL
          for (int r = m; r < m + 2; ++r) {
            store(to_rows + strip_at / 2 + static_cast<int64_t>(row + r) * (kStrip<Math> / 2),
                  bit_cast<VecU32>(_mm512_cvtne2ps_pbh(block.at[r][1], block.at[r][0])));
          }
        }
      }
    }
  }

  template <int M>
  ANYMASK_INLINE void run(int row) const {
    constexpr int64_t kItem = sizeof(Item);
    next_q.fetch(row, M);
    next_dout.fetch(row, M);
    dq.fetch(row, M);
    Block<Math, M, kVectors> acc;
    clear(acc);
    multiply(acc, scratch.q + static_cast<int64_t>(row) * scratch.q_stride,
             scratch.q_stride * kItem, kItem,
             scratch.k_columns + static_cast<int64_t>(strip) * kStrip<Math> * scratch.q_items,
             kStrip<Math>, scratch.q_items);
    const Vec by = splat<Vec>(factor);
    ANYMASK_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec shift = splat<Vec>(scratch.shift[row + m]);
      ANYMASK_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        Vec x = exp2_of(acc.at[m][n] * by - shift);
        if constexpr (kMasked) {
          x = select_words(words + n * kLanes, (row + m) % kGroupRows, x, Vec{});
        }
        acc.at[m][n] = x;
      }
    }
    put(acc, row, scratch.p, nullptr);
    store_block(acc, scratch.p_block, kStrip<Math>);

    clear(acc);
    multiply(acc, scratch.dout + static_cast<int64_t>(row) * scratch.v_stride,
             scratch.v_stride * kItem, kItem,
             scratch.v_columns + static_cast<int64_t>(strip) * kStrip<Math> * scratch.v_items,
             kStrip<Math>, scratch.v_items);
    const Vec scaled = splat<Vec>(scale);
    ANYMASK_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec delta = splat<Vec>(scratch.delta[row + m]);
      ANYMASK_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        const Vec x = load<Vec>(scratch.p_block + m * kStrip<Math> + n * kLanes);
        acc.at[m][n] = (acc.at[m][n] - delta) * (x * scaled);
      }
    }
    put(acc, row, scratch.ds, scratch.ds_rows);
  }
};

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
  for (int s = 0; s < units.strips; ++s) {
    const auto share = [&](const void* data, int64_t stride, int columns, int64_t size) {
      return Ahead::share(data, stride, columns, size, s, units.strips);
    };
    const Ahead next_q = share(tile.next_q, tile.q.stride, job.head_dim, sizeof(Raw));
    const Ahead next_dout = share(tile.next_dout, tile.dout.stride, job.v_head_dim, sizeof(Raw));
    const Ahead dq = share(tile.dq.data, tile.dq.stride, job.head_dim, sizeof(T));
    for (int g = 0; g < units.groups; ++g) {
      const int begin = g * kGroupRows;
      if (units.state[g][s] == 1) {
        for_blocks_in<kGroupRows>(
            begin,
            Probabilities<Math, false>{scratch, s, factor, scale, nullptr, next_q, next_dout, dq});
      } else if (units.state[g][s] == 2) {
        const uint32_t* words = tile.words.data + g * tile.words.stride + s * kStrip<Math>;
        for_blocks_in<kGroupRows>(begin, Probabilities<Math, true>{scratch, s, factor, scale, words,
                                                                   next_q, next_dout, dq});
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
