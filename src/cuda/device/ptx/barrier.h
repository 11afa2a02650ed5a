// Barriers: mbarriers in shared memory (arrivals and bytes) and the numbered barriers of a block.
#pragma once

#include "rules/common.h"

namespace anymask::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One mbarrier. A phase completes when all arrivals and all expected bytes are in.
struct alignas(8) Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(arrivals));
  }

  // Release: what this thread wrote before is visible to whoever waits.
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state))
                 : "memory");
  }

  // The same, once for a warp: when all its lanes are here.
  __device__ __forceinline__ void arrive_warp(int lane) {
    __syncwarp();
    if (lane == 0) arrive();
  }

  // One arrival that also announces `bytes` of bulk copies.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }

  // Announces `bytes` of bulk copies without arriving. The phase must have arrivals to come.
  __device__ __forceinline__ void expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }

  // Whether the phase of this parity has completed; looks at once.
  __device__ __forceinline__ bool test(uint32_t parity) const {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&state)), "r"(parity)
        : "memory");
    return done != 0;
  }

  // The same, but sleeps up to `nanoseconds` for it.
  __device__ __forceinline__ bool wait_for(uint32_t parity, uint32_t nanoseconds) const {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&state)), "r"(parity), "r"(nanoseconds)
        : "memory");
    return done != 0;
  }

  // Waits until the phase of this parity has completed. A fresh barrier passes a wait for parity 1.
  // The time limit lets the warp sleep: without one it wakes up every few dozen cycles, and three
  // waiting warps issued 5% of a kernel's instructions.
  __device__ __forceinline__ void wait(uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(shared_address(&state)),
        "r"(parity), "r"(10000000)
        : "memory");
  }
};

// Makes mbarrier.init visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Numbered barriers 1..15 of a block (0 is __syncthreads).
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The half of it that does not wait.
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace anymask::ptx
