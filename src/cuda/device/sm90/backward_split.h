// Flash attention backward for Hopper (sm_90a), dQ apart from dK and dV: some blocks walk key tiles
// and make dK and dV, the others walk row tiles and make dQ.
//
// S and P are computed once more than when a block makes all three. But no sum of dQ is ever in
// memory, and all sums have one order. docs/kernels/backward.md says when that is faster.
#pragma once

#include "cuda/device/sm90/backward.h"
#include "cuda/device/sm90/backward_rows.h"
#include "cuda/device/sm90/row_roles.h"

namespace anymask::cuda {

enum class BlockWork : int32_t { kNone, kKeys, kRows };

// How many items nobody has drawn.
template <typename Params>
__device__ __forceinline__ int items_left(const Params& p) {
  return p.items - p.blocks - *const_cast<const volatile int32_t*>(p.next_item);
}

// What a block that comes late helps with. One thread looks, since others draw meanwhile.
__device__ __forceinline__ BlockWork find_work(const SplitParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  int32_t& found = *reinterpret_cast<int32_t*>(memory);
  if (threadIdx.x == 0) {
    const BlockWork work = items_left(p.keys) > 0   ? BlockWork::kKeys
                           : items_left(p.rows) > 0 ? BlockWork::kRows
                                                    : BlockWork::kNone;
    found = static_cast<int32_t>(work);
  }
  __syncthreads();
  const int32_t work = ptx::uniform(found);
  __syncthreads();
  return static_cast<BlockWork>(work);
}

// Twice as many blocks as fit at once. The first begin with the items of their kind; the others
// start where one of those has ended, which is when its kind has no more items, and help with the
// kind that has.
template <SplitConfig C>
__device__ __forceinline__ void backward_split_kernel(const SplitParams& p) {
  static_assert(C.keys.threads() == C.rows.threads());
  static_assert(sizeof(BackwardShared<C.keys>) <= C.shared_bytes());
  static_assert(sizeof(RowPassShared<C.rows>) <= C.shared_bytes());
  if (!p.keys.splits()) return;
  const int block = blockIdx.x, begin_rows = p.keys.blocks;
  const bool helps = block >= begin_rows + p.rows.blocks;
  BlockWork work = block < begin_rows ? BlockWork::kKeys : BlockWork::kRows;
  if (helps) work = find_work(p);
  if (work == BlockWork::kKeys) {
    run_key_roles<C.keys>(p.keys, helps ? kDrawFirst : block);
  } else if (work == BlockWork::kRows) {
    run_row_roles<C.rows, RowPassShared<C.rows>, RowPassWarp<C.rows>>(
        p.rows, helps ? kDrawFirst : block - begin_rows);
  }
}

}  // namespace anymask::cuda
