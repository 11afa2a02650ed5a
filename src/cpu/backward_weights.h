// Backward: from the scores of some rows x one strip of keys to P, and from dP to dS.
#pragma once

#include "cpu/kernels.h"
#include "cpu/packing.h"
#include "cpu/score_tile.h"

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
  T* p_block;  // P of kBlock rows, not rounded, nothing dropped
  T* slope;    // of their softcap

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
    slope = arena.take<T>(kBlock * kStrip<Math>);
    bytes = static_cast<size_t>(arena.at - static_cast<char*>(scratch));
  }
};

template <class Math>
ANYMASK_INLINE BackwardScratch<Math> scratch_of(const BackwardJob& job) {
  return BackwardScratch<Math>(job.scratch, job.tile_rows, job.tile_keys, job.head_dim,
                               job.v_head_dim);
}

// Calls body(m, n, vector) for the vectors of a block.
template <class Math, int M, class Body>
ANYMASK_INLINE void each_vector(Block<Math, M, kVectors>& block, const Body& body) {
  ANYMASK_UNROLL
  for (int m = 0; m < M; ++m) {
    ANYMASK_UNROLL
    for (int n = 0; n < kVectors; ++n) body(m, n, block.at[m][n]);
  }
}

// Weights of scores that are only scaled.
template <class Math, bool kMasked>
struct PlainWeights {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  static constexpr int kLanes = kLanesOf<Math>;
  const BackwardScratch<Math>& scratch;
  T factor, scale;
  const uint32_t* words;  // of the group and strip

  // Scores to P, and P to scratch.p_block.
  template <int M>
  ANYMASK_INLINE void weigh(Block<Math, M, kVectors>& acc, int row) const {
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
    store_block(acc, scratch.p_block, kStrip<Math>);
  }
  // dP to dS.
  template <int M>
  ANYMASK_INLINE void differentiate(Block<Math, M, kVectors>& acc, int row) const {
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
  }
};

// Weights of scores with softcap, biases or dropout; what there is of them is looked up a block at
// a time.
template <class Math>
struct ChangedWeights {
  using T = typename Math::T;
  using Vec = typename Math::Vec;
  static constexpr int kLanes = kLanesOf<Math>;
  const BackwardScratch<Math>& scratch;
  Capping<Vec> capping;
  T scale, keep_scale;
  const uint32_t* words;  // of the group and strip; nullptr: nothing is hidden
  const uint32_t* kept;   // nullptr: nothing is dropped
  const T* biases;        // [row][key] from the strip on; nullptr: none
  T* dlogits;             // the same; nullptr: not wanted
  int64_t stride;         // of rows of both

  template <int M>
  ANYMASK_INLINE void weigh(Block<Math, M, kVectors>& acc, int row) const {
    each_vector<Math>(acc, [&](int m, int n, Vec& x) {
      Vec slope;
      x = capping.of(x, &slope);
      if (capping.capped) store(scratch.slope + m * kStrip<Math> + n * kLanes, slope);
    });
    if (biases != nullptr) {
      each_vector<Math>(acc, [&](int m, int n, Vec& x) {
        x += load<Vec>(biases + (row + m) * stride + n * kLanes);
      });
    }
    each_vector<Math>(acc, [&](int m, int, Vec& x) {
      x = exp2_of(x * splat<Vec>(static_cast<T>(kLog2E)) - splat<Vec>(scratch.shift[row + m]));
    });
    if (words != nullptr) keep(acc, words, row);
    store_block(acc, scratch.p_block, kStrip<Math>);
    drop(acc, row);
  }
  template <int M>
  ANYMASK_INLINE void differentiate(Block<Math, M, kVectors>& acc, int row) const {
    drop(acc, row);
    each_vector<Math>(acc, [&](int m, int n, Vec& x) {
      x = (x - splat<Vec>(scratch.delta[row + m])) *
          load<Vec>(scratch.p_block + m * kStrip<Math> + n * kLanes);
    });
    if (dlogits != nullptr) store_block(acc, dlogits + row * stride, stride);
    each_vector<Math>(acc, [&](int m, int n, Vec& x) {
      x *= splat<Vec>(scale);
      if (capping.capped) x *= load<Vec>(scratch.slope + m * kStrip<Math> + n * kLanes);
    });
  }

 private:
  template <int M>
  ANYMASK_INLINE void drop(Block<Math, M, kVectors>& acc, int row) const {
    if (kept == nullptr) return;
    each_vector<Math>(acc, [&](int, int, Vec& x) { x *= splat<Vec>(keep_scale); });
    keep(acc, kept, row);
  }
  template <int M>
  static ANYMASK_INLINE void keep(Block<Math, M, kVectors>& acc, const uint32_t* bits, int row) {
    each_vector<Math>(acc, [&](int m, int n, Vec& x) {
      x = select_words(bits + n * kLanes, (row + m) % kGroupRows, x, Vec{});
    });
  }
};

// P and dS of some rows x one strip of keys.
template <class Math, class Weights>
struct Probabilities {
  using Item = typename Math::Item;
  static constexpr int kLanes = kLanesOf<Math>;
  const BackwardScratch<Math>& scratch;
  int strip;
  Weights weights;
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
    weights.weigh(acc, row);
    put(acc, row, scratch.p, nullptr);

    clear(acc);
    multiply(acc, scratch.dout + static_cast<int64_t>(row) * scratch.v_stride,
             scratch.v_stride * kItem, kItem,
             scratch.v_columns + static_cast<int64_t>(strip) * kStrip<Math> * scratch.v_items,
             kStrip<Math>, scratch.v_items);
    weights.differentiate(acc, row);
    put(acc, row, scratch.ds, scratch.ds_rows);
  }
};

}  // namespace anymask::cpu::ANYMASK_ISA
