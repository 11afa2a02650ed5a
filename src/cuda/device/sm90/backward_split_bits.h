// The bit-making warps of the Hopper backward kernel that makes dQ apart from dK and dV: they make
// bits by rows or by keys, as the loading warp asks.
#pragma once

#include "cuda/device/sm90/backward_bits.h"
#include "cuda/device/sm90/backward_split_shared.h"
#include "cuda/device/sm90/mask_bits.h"

namespace anymask::cuda {

// Warp `index` of kBitWarps.
template <SplitConfig C>
__device__ __forceinline__ void make_split_bits(const SplitParams& p, SplitShared<C>& shared,
                                                int index, int lane) {
  Ring<kRequestSlots> requests;
  Ring<C.rows().bit_slots> row_slots;
  Ring<C.keys().bit_slots> key_slots;
  constexpr MaskPath kMasks = C.rows().masks();
  RecipeArrays& arrays = shared.arrays[index];
  int piece = index;
  for (;; requests.next()) {
    shared.request_full[requests.slot].wait(requests.parity);
    const SplitRequest& request = shared.requests[requests.slot];
    const auto work = static_cast<SplitWork>(ptx::uniform(static_cast<int>(request.work)));
    if (work == SplitWork::kNone) break;
    if (kMasks != MaskPath::kMachine && request.keys.fresh != 0) {
      if (lane == 0) arrays = recipe_arrays<kMasks>(p.rows, request.keys.place);
      __syncwarp();
    }
    if (work == SplitWork::kRows) {
      make_tile_bits<C.rows()>(p.rows, shared, arrays, request.item, request.keys.key_tile,
                               row_slots, piece, lane);
      row_slots.next();
    } else {
      shared.key_bits_empty[key_slots.slot].wait(key_slots.parity ^ 1);
      constexpr bool kRuns = SplitShared<C>::kHandsOverRuns;
      auto& runs = shared.runs[kRuns ? key_slots.slot : 0];
      const auto find = [&](int position, int key_index) {
        const int key = arrays.key_order != nullptr ? arrays.key_order[position] : position;
        const ColumnRuns of_key = column_runs<kMasks>(p.rows, arrays, key);
        runs.ends[0][key_index] = of_key.begin;
        runs.ends[1][key_index] = of_key.end;
        if constexpr (kMasks == MaskPath::kRuns) return;
        runs.ends[2][key_index] = of_key.begin1;
        runs.ends[3][key_index] = of_key.end1;
        runs.ends[4][key_index] = of_key.begin2;
        runs.ends[5][key_index] = of_key.end2;
      };
      make_tile_key_bits<C.keys(), kBitWarps>(p.keys, request.keys, find, runs,
                                              shared.key_bits[kRuns ? 0 : key_slots.slot],
                                              shared.key_bits_full[key_slots.slot], index, lane);
      key_slots.next();
    }
    shared.request_empty[requests.slot].arrive_warp(lane);
  }
}

}  // namespace anymask::cuda
