// Online softmax on wgmma accumulators: a thread holds two rows (r = 0, 1), N / 4 columns of each.
#pragma once

#include "cuda/device/ptx/registers.h"

namespace anymask::cuda {

inline constexpr float kMinusInfinity = __builtin_bit_cast(float, 0xff800000u);

// The largest of a thread's scores, by row: accumulator i belongs to (i / 2) % 2.
template <int kCount>
__device__ __forceinline__ void thread_maxima(const float (&scores)[kCount], float (&top)[2]) {
  // Four chains a row keep the latency of the comparisons hidden.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float chain[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) chain[c] = scores[4 * (c / 2) + 2 * r + c % 2];
#pragma unroll
    for (int i = 8; i < kCount; i += 8) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        chain[c] = fmaxf(chain[c], scores[i + 4 * (c / 2) + 2 * r + c % 2]);
      }
    }
    top[r] = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
  }
}

// The same, or 0 if that is larger. The bits of floats above 0 are ordered as integers are, and one
// instruction compares three integers: half of the instructions.
template <int kCount>
__device__ __forceinline__ void thread_bounds(const float (&scores)[kCount], float (&bound)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int chain[2] = {0, 0};
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 8) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        chain[c] = __vimax3_s32(chain[c], __float_as_int(scores[i + 4 * c]),
                                __float_as_int(scores[i + 4 * c + 1]));
      }
    }
    bound[r] = __int_as_float(max(chain[0], chain[1]));
  }
}

// A maximum far below every score, yet finite: exp2(-inf - top) is 0 also before anything was seen.
inline constexpr float kNothing = -1e38f;

struct RowState {
  // What scores, times scale and log2(e), are measured from: within 8 of their true maximum.
  float top[2];
  // This thread's share of the sum of exp2(score - top).
  float sum[2];

  __device__ __forceinline__ void reset() {
    top[0] = top[1] = kNothing;
    sum[0] = sum[1] = 0.0f;
  }

  static constexpr float kSlack = 8.0f;

  // Whether scores, of which a thread has none above `most` in its rows, move a reference of the
  // warp.
  __device__ __forceinline__ bool moved_by(const float (&most)[2], float scale_log2) const {
    const auto moves = [&](int r) { return most[r] * scale_log2 - top[r] > kSlack; };
    return __any_sync(0xffffffffu, moves(0) || moves(1));
  }

  // Takes this thread's scores of a tile in. The reference moves only when it has to: up to 2^8
  // above it, exp2 stays far inside float32 and bf16, and neither output nor sum has to be
  // rescaled. Whether it has to is known without the other lanes of a row, so their maxima are
  // asked for only then (causal, S = 8192, 7% faster), and with kBounds this thread's only where
  // bounds do not say it (4%; D = 64: 6%). Returns whether some row of the warp moved; factor, if
  // so: what the output of each row is to be multiplied by.
  template <bool kBounds, int kCount>
  __device__ __forceinline__ bool raise(const float (&scores)[kCount], float scale_log2,
                                        float (&factor)[2]) {
    float seen[2];
    if constexpr (kBounds) {
      thread_bounds(scores, seen);
      if (!moved_by(seen, scale_log2)) return false;
    }
    thread_maxima(scores, seen);
    if (!moved_by(seen, scale_log2)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seen[r] *= scale_log2;
      seen[r] = fmaxf(seen[r], ptx::shuffle_xor(seen[r], 1));
      seen[r] = fmaxf(seen[r], ptx::shuffle_xor(seen[r], 2));
      const bool move = seen[r] - top[r] > kSlack;
      factor[r] = move ? ptx::exp2_fast(top[r] - seen[r]) : 1.0f;
      if (move) top[r] = seen[r];
      sum[r] *= factor[r];
    }
    return true;
  }
};

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&values)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] *= factor[(i / 2) % 2];
}

// A quad's lanes hold 2 of 8 columns each for four blocks of columns; afterwards lane q holds all 8
// of block q, in order.
__device__ __forceinline__ void transpose_quad(uint32_t (&pieces)[4], int q) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (q & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t given = upper ? pieces[i] : pieces[i + step];
      const uint32_t taken = ptx::shuffle_xor(given, step);
      if (upper) {
        pieces[i] = taken;
      } else {
        pieces[i + step] = taken;
      }
    }
  }
}

}  // namespace anymask::cuda
