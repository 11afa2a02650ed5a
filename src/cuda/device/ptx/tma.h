// Bulk tensor copies (TMA): global memory to shared memory, finished on an mbarrier. A map is the
// driver's CUtensorMap inside a __grid_constant__ parameter.
#pragma once

#include "cuda/device/ptx/barrier.h"

namespace anymask::ptx {

__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// L2's policy for what nobody will ask for again, as createpolicy makes it for all of the bytes:
// evict first.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000;

// Copies the map's box at (x, row, head, batch) to `to`; elements outside the tensor become 0.
__device__ __forceinline__ void load_box(void* to, const void* map, Barrier& barrier, int x,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(&barrier.state)), "r"(x), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same, of what the kernel reads only once.
__device__ __forceinline__ void load_box_once(void* to, const void* map, Barrier& barrier, int x,
                                              int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(&barrier.state)), "r"(x), "r"(row), "r"(head), "r"(batch),
      "l"(kEvictFirst)
      : "memory");
}

// Writes a box from shared memory, in the caller's bulk group; what lies beyond the tensor is not
// written. The kernel does not read it.
__device__ __forceinline__ void store_box(const void* map, const void* from, int x, int row,
                                          int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, "
      "%5}], [%1], %6;" ::"l"(map),
      "r"(shared_address(from)), "r"(x), "r"(row), "r"(head), "r"(batch), "l"(kEvictFirst)
      : "memory");
}

}  // namespace anymask::ptx
