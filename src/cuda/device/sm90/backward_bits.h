// Mask bits for the Hopper backward kernel, made by idle warps of the producer warpgroup. Where one
// run of rows sees a key (MaskPath::kRuns) they only find the runs, once for an item; the math
// threads make bits of them in less time than it takes to hand bits over.
//
// Keys are the rows of S^T, and the rules' word is 32 query rows of one key: a word is used as it
// is made. A math thread shifts it by twice its quad lane and finds its queries at fixed places.
//
// The math warps take 2 x 240 of the 504 registers that a block of 384 threads starts with, so a
// producer has 24. Under a recipe that is enough: which rows see a key is six numbers, found once
// for an item, and a word is a few shifts of them. The postfix machine spills.
#pragma once

#include "cuda/device/rows_of_id.h"
#include "cuda/device/sm90/backward_kept.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

template <int kKeys>
__device__ __forceinline__ void find_runs(const BackwardParams& p, rules::Place place, int position,
                                          KeyRuns<kKeys>& runs, int key_index) {
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
  // Masked from some row on, or up to some row: that is one run of visible rows, and quicker.
  if (masked.end1 == 0x7fffffff) {
    end = rules::min_of(end, masked.begin1);
    masked.begin1 = masked.end1 = 0;
  }
  if (masked.begin2 <= 0) {
    begin = rules::max_of(begin, masked.end2);
    masked.begin2 = masked.end2 = 0;
  }
  const int32_t ends[6] = {begin, end, masked.begin1, masked.end1, masked.begin2, masked.end2};
#pragma unroll
  for (int i = 0; i < 6; ++i) runs.ends[i][key_index] = ends[i];
}

// Rows [row, row + 32) that the recipe's ids show a lane's key. A converged warp.
__device__ __forceinline__ uint32_t word_of_ids(const BackwardParams& p, rules::Place place,
                                                int position, bool exists, int row, int lane) {
  const rules::Node& node = p.program.nodes[p.recipe.ids];
  int64_t column_id = 0, row_id = 0;
  if (exists) {
    const int64_t key = rules::key_at(p.program, place, position);
    column_id = rules::load_integer(node.columns, place, key * node.columns.row_stride);
  }
  if (row + lane < p.q_len) {
    row_id = rules::load_integer(node.rows, place, (row + lane) * node.rows.row_stride);
  }
  return rows_of_id(row_id, column_id, rules::low_bits(rules::min_of(p.q_len - row, 32)),
                    node.flag != 0);
}

// What `request` asks for, by warp `index` of kWarps. Under MaskPath::kRuns runs, else bits, for
// which runs are scratch. find(position, key_index) finds runs. Unless every tile has kept pairs,
// `full` is told every 32 keys.
template <BackwardConfig C, int kWarps, typename Find>
__device__ __forceinline__ void make_tile_key_bits(const BackwardParams& p,
                                                   const BitRequest& request, Find&& find,
                                                   KeyRuns<C.columns()>& runs, uint32_t (*bits)[2],
                                                   ptx::Barrier& full, int index, int lane) {
  // The same keys for a warp at all times, so it needs nobody else's runs.
  // A loop that all lanes leave together keeps uniform registers usable, and with dropout 200
  // bytes from being spilled. But where query heads are items of their own, the compiler then
  // spills two registers of math threads in their loop.
  constexpr bool kUniform = C.adds_keys == 0;
#pragma unroll 1
  for (int at = 32 * index + (kUniform ? 0 : lane); at < C.columns(); at += 32 * kWarps) {
    const int key = kUniform ? at + lane : at;
    const int position = request.key_tile * C.columns() + key;
    const bool exists = position < p.kv_len;
    if constexpr (C.masks() == MaskPath::kRuns) {
      if (exists) find(position, key);
      if (!exists) {
#pragma unroll
        for (int i = 0; i < 6; ++i) runs.ends[i][key] = 0;
      }
      full.arrive_warp(lane);
      continue;
    }
    if constexpr (C.masks() == MaskPath::kRecipe) {
      if (exists && request.fresh != 0) {
        find(position, key);
      }
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = request.row_tile * kBackwardRows + 32 * half;
      uint32_t word = 0;
      if (exists && row < p.q_len) {
        if constexpr (C.masks() == MaskPath::kRecipe) {
          word = word_of_runs(p, runs, key, row);
          if (p.recipe.bits >= 0) {
            word &= rules::bits_word(p.program.nodes[p.recipe.bits], request.place,
                                     rules::key_at(p.program, request.place, position), row);
          }
        } else {
          word = rules::column_word(p.program, request.place, position, row);
        }
      }
      if constexpr (C.masks() == MaskPath::kRecipe && ids_by_recipe(C.has_turns(), C.features)) {
        if (p.recipe.ids >= 0 && row < p.q_len) {
          word &= word_of_ids(p, request.place, position, exists, row, lane);
        }
      }
      bits[key][half] = word;
    }
    if constexpr (!C.has(kDropout)) full.arrive_warp(lane);
  }
}

// C.makes_bits().
template <BackwardConfig C>
__device__ __forceinline__ void make_key_bits(const BackwardParams& p, BackwardShared<C>& shared,
                                              int index, int lane) {
  using Shared = BackwardShared<C>;
  Ring<C.bit_slots> slots;
  KeptPairs<C> kept_pairs(index);
  for (;; slots.next()) {
    shared.request_full[slots.slot].wait(slots.parity);
    const BitRequest& request = shared.requests[slots.slot];
    if (ptx::uniform(request.row_tile) < 0) break;
    if constexpr (C.has(kDropout)) {
      kept_pairs.make(p, shared, slots.slot, lane);
      if (C.baked() || ptx::uniform(shared.kept_requests[slots.slot].masked) == 0) {
        shared.bits_full[slots.slot].arrive_warp(lane);
        continue;
      }
    }
    constexpr bool kRuns = Shared::kHandsOverRuns;
    auto& runs = shared.runs[kRuns ? slots.slot : 0];
    const auto find = [&](int position, int key_index) {
      find_runs(p, request.place, position, runs, key_index);
    };
    make_tile_key_bits<C, Shared::kKeyBitWarps>(p, request, find, runs,
                                                shared.bits[kRuns ? 0 : slots.slot],
                                                shared.bits_full[slots.slot], index, lane);
    if constexpr (C.has(kDropout)) shared.bits_full[slots.slot].arrive_warp(lane);
  }
}

}  // namespace anymask::cuda
