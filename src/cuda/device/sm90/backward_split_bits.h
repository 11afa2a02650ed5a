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
  RecipeArrays& arrays = shared.arrays[index];
  int piece = index;
  for (;; requests.next()) {
    shared.request_full[requests.slot].wait(requests.parity);
    const SplitRequest& request = shared.requests[requests.slot];
    const auto work = static_cast<SplitWork>(ptx::uniform(static_cast<int>(request.work)));
    if (work == SplitWork::kNone) break;
    if (work == SplitWork::kRows) {
      const Item item = request.item;
      if (C.rows().masks() != MaskPath::kMachine && request.fresh_rows != 0) {
        if (lane == 0) arrays = recipe_arrays(p.rows, item);
        __syncwarp();
      }
      make_tile_bits<C.rows()>(p.rows, shared, arrays, item, request.keys.key_tile, row_slots,
                               piece, lane);
      row_slots.next();
    } else {
      shared.key_bits_empty[key_slots.slot].wait(key_slots.parity ^ 1);
      constexpr bool kRuns = SplitShared<C>::kHandsOverRuns;
      make_tile_key_bits<C.keys(), kBitWarps>(p.keys, request.keys,
                                              shared.runs[kRuns ? key_slots.slot : 0],
                                              shared.key_bits[kRuns ? 0 : key_slots.slot],
                                              shared.key_bits_full[key_slots.slot], index, lane);
      key_slots.next();
    }
    shared.request_empty[requests.slot].arrive_warp(lane);
  }
}

}  // namespace anymask::cuda
