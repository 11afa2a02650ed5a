// What the two halves of a math warp's work have in common, in the Hopper backward kernel that
// makes dQ apart from dK and dV: where they are among phases, steps and slots.
#pragma once

#include "cuda/device/ptx/bulk.h"
#include "cuda/device/ptx/registers.h"
#include "cuda/device/ptx/wgmma_shared.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_split_shared.h"

namespace anymask::cuda {

template <SplitConfig C>
struct SplitPlace {
  using Shared = SplitShared<C>;
  static constexpr auto kElement = C.keys().half != 0 ? ptx::Element::kF16 : ptx::Element::kBf16;
  using PieceProduct = ptx::Wgmma<kElement, 64>;

  Shared& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;
  uint32_t phase = 0;  // how many are behind: registers are scarce
  SlotQueue slots;
  uint32_t parity = 0;     // of slot_full, a bit each, and above them of keys_read
  int rows = 0, keys = 0;  // the two slots of the tile's own, 8 bits each
  int leaving = 0;         // the keys' of the tile before, if what leaves may still be read; or 0

  __device__ __forceinline__ int phase_slot() const {
    return static_cast<int>(phase % kPhaseSlots);
  }

  __device__ __forceinline__ SplitPhase begin_phase() {
    shared.phase_full[phase_slot()].wait(phase / kPhaseSlots % 2);
    return shared.phases[phase_slot()].unpacked();
  }

  __device__ __forceinline__ SplitTile tile_of_phase() const {
    const SplitTile& tile = shared.phases[phase_slot()].tile;
    return {ptx::uniform(tile.tile), ptx::uniform(tile.batch), ptx::uniform(tile.head)};
  }

  __device__ __forceinline__ void end_phase() {
    shared.phase_empty[phase_slot()].arrive_warp(lane);
    ++phase;
  }

  // Of a slot just taken: returns when it is full.
  __device__ __forceinline__ void wait_for(int slot) {
    shared.slot_full[slot].wait((parity >> slot) & 1);
    parity ^= 1u << slot;
  }

  // A warpgroup whose rows see little may be far ahead of the other, which still reads its keys.
  __device__ __forceinline__ void await_keys_read() {
    shared.keys_read.wait((parity >> kSplitSlots) & 1);
    parity ^= 1u << kSplitSlots;
  }

  // Gives it back. All that is in it must have come, even if it was not needed.
  __device__ __forceinline__ void release(int slot) { shared.slot_empty[slot].arrive_warp(lane); }

  __device__ __forceinline__ int take_both() {
    const int first = slots.take(), second = slots.take();
    wait_for(first);
    wait_for(second);
    return first | second << 8;
  }

  // This warpgroup's of two.
  __device__ __forceinline__ int own(int both) const {
    return ptx::uniform(w == 0 ? both & 255 : both >> 8);
  }

  // dK and dV leave from where K and V were, which are given back when they have been read; by then
  // something else is to be done.
  __device__ __forceinline__ void return_keys() {
    if (leaving == 0) return;
    if (lane == 0) ptx::bulk_wait_read<0>();
    release(leaving & 255);
    release(leaving >> 8);
    leaving = 0;
  }

  // 64 x 64 products of two slots' tiles: a b^T.
  template <int kSlabs>
  __device__ __forceinline__ void multiply(float (&to)[kPieceValues],
                                           const uint8_t (&a_tile)[kSlabs][Shared::kSlabBytes],
                                           const uint8_t (&b_tile)[kSlabs][Shared::kSlabBytes]) {
    const uint32_t a = ptx::opaque(ptx::lower_k_major(a_tile));
    const uint32_t b = ptx::lower_k_major(b_tile);
#pragma unroll
    for (int i = 0; i < 4 * kSlabs; ++i) {
      const int offset = (i / 4 * Shared::kSlabBytes + (i % 4) * 32) / 16;
      PieceProduct::product_ss(to, ptx::descriptor(a + offset), ptx::descriptor(b + offset), i > 0);
    }
  }

  // The same with a's 64 rows in registers.
  template <int kSlabs>
  __device__ __forceinline__ void multiply(float (&to)[kPieceValues],
                                           uint32_t (&a)[kSlabs][kPieceValues / 2],
                                           const uint8_t (&b_tile)[kSlabs][Shared::kSlabBytes]) {
    const uint32_t b = ptx::lower_k_major(b_tile);
#pragma unroll
    for (int i = 0; i < 4 * kSlabs; ++i) {
      const int offset = (i / 4 * Shared::kSlabBytes + (i % 4) * 32) / 16;
      PieceProduct::template product_rs<false>(to, &a[i / 4][4 * (i % 4)],
                                               ptx::descriptor(b + offset), i > 0);
    }
  }

  // to += a b, a 64 x 64 of registers, b 64 rows of a slot.
  template <int kCount, int kSlabs>
  __device__ __forceinline__ void add_product(float (&to)[kCount], uint32_t (&a)[kPieceValues / 2],
                                              const uint8_t (&b_tile)[kSlabs][Shared::kSlabBytes]) {
    using Product = ptx::Wgmma<kElement, 2 * kCount>;
    const uint32_t b = ptx::lower_mn_major(b_tile, Shared::kSlabBytes);
    ptx::pin(to);
    ptx::pin(a);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Product::product_rs(to, &a[4 * i], ptx::descriptor(b + i * kSlabRowBytes), true);
    }
    ptx::wgmma_commit();
  }
};

}  // namespace anymask::cuda
