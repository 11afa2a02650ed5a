// Mask bits for the Hopper backward kernel, made by idle warps of the producer warpgroup.
//
// Keys are the rows of S^T, and the rules' word is 32 query rows of one key: a word is used as it
// is made. A math thread shifts it by twice its quad lane and finds its queries at fixed places.
//
// The math warps take 2 x 240 of the 504 registers that a block of 384 threads starts with, so a
// producer has 24. Under a recipe that is enough: which rows see a key is six numbers, found once
// for an item, and a word is a few shifts of them. The postfix machine spills.
#pragma once

#include "cuda/device/sm90/backward_schedule.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

template <int kColumns>
__device__ __forceinline__ void find_runs(const BackwardParams& p, rules::Place place, int position,
                                          int32_t (*runs)[kColumns]) {
  const int key = rules::key_at(p.program, place, position);
  int begin = key - p.recipe.band_hi, end = key - p.recipe.band_lo + 1;
  if (p.recipe.segments >= 0) {
    const rules::Segment segment =
        rules::segment_of(p.program.nodes[p.recipe.segments], place, key);
    begin = rules::max_of(begin, segment.begin);
    end = rules::min_of(end, segment.end);
  }
  if (p.recipe.prefix >= 0 &&
      key >= rules::prefix_length(p.program.nodes[p.recipe.prefix], place)) {
    end = begin;
  }
  rules::MaskedRuns masked = {0, 0, 0, 0};
  if (p.recipe.intervals >= 0) {
    masked = rules::masked_runs(p.program.nodes[p.recipe.intervals], place, key);
  }
  runs[0][0] = begin;
  runs[1][0] = end;
  runs[2][0] = masked.begin1;
  runs[3][0] = masked.end1;
  runs[4][0] = masked.begin2;
  runs[5][0] = masked.end2;
}

// The word of rows [row, row + 32) from a key's runs.
template <int kColumns>
__device__ __forceinline__ uint32_t word_of_runs(const BackwardParams& p, rules::Place place,
                                                 int position, int row,
                                                 const int32_t (*runs)[kColumns]) {
  uint32_t word = rules::run_word(runs[0][0], runs[1][0], row);
  if (p.recipe.intervals >= 0) {
    word &= ~rules::run_word(runs[2][0], runs[3][0], row);
    word &= ~rules::run_word(runs[4][0], runs[5][0], row);
  }
  if (p.recipe.bits >= 0) {
    word &= rules::bits_word(p.program.nodes[p.recipe.bits], place,
                             rules::key_at(p.program, place, position), row);
  }
  return word;
}

template <BackwardConfig C>
__device__ __forceinline__ void make_key_bits(const BackwardParams& p, BackwardShared<C>& shared,
                                              int index, int lane) {
  using Shared = BackwardShared<C>;
  Ring<C.bit_slots> slots;
  for (;; slots.next()) {
    shared.request_full[slots.slot].wait(slots.parity);
    const BitRequest& request = shared.requests[slots.slot];
    if (request.row_tile < 0) break;
      // The same keys for a warp at all times, so it needs nobody else's runs.
#pragma unroll 1
    for (int key = 32 * index + lane; key < C.columns(); key += 32 * Shared::kKeyBitWarps) {
      const int position = request.key_tile * C.columns() + key;
      const bool exists = position < p.kv_len;
      if constexpr (C.machine == 0) {
        if (exists && request.fresh != 0) {
          find_runs<C.columns()>(p, request.place, position,
                                 reinterpret_cast<int32_t(*)[C.columns()]>(&shared.runs[0][key]));
        }
      }
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int row = request.row_tile * kBackwardRows + 32 * half;
        uint32_t word = 0;
        if (exists && row < p.q_len) {
          if constexpr (C.machine == 0) {
            word = word_of_runs<C.columns()>(
                p, request.place, position, row,
                reinterpret_cast<const int32_t(*)[C.columns()]>(&shared.runs[0][key]));
          } else {
            word = rules::column_word(p.program, request.place, position, row);
          }
        }
        shared.bits[slots.slot][key][half] = word;
      }
      __syncwarp();
      if (lane == 0) shared.bits_full[slots.slot].arrive();
    }
  }
}

}  // namespace anymask::cuda
