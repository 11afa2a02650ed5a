// Runs simple kernels on the CPU, one block after another, so that their logic is tested without a
// GPU. Every thread is a fiber; a collective operation hands on until its whole warp or block has
// come to it. Include before the device headers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __shared__ static

namespace anymask::cuda {

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx;

struct uint4 {
  uint32_t x, y, z, w;
};

// The fibers of one block.
class EmulatedBlock {
 public:
  EmulatedBlock(int threads, std::function<void()> body)
      : body_(std::move(body)), fibers_(static_cast<size_t>(threads)) {
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  }

  void run(unsigned block) {
    current_ = this;
    blockIdx.x = block;
    block_barrier_ = {static_cast<int>(fibers_.size()), 0, 0};
    warp_barriers_.assign(fibers_.size() / 32, Barrier{32, 0, 0});
    slots_.assign(fibers_.size(), 0);
    for (Fiber& fiber : fibers_) prepare(fiber);
    for (size_t running = fibers_.size(); running > 0;) {
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (!fibers_[i].done && step(i)) --running;
      }
    }
  }

  static EmulatedBlock& current() { return *current_; }

  void wait_for_block() { wait(block_barrier_); }

  // Every lane gives a value and gets those of its warp.
  template <typename T, typename Read>
  auto exchange(T value, Read read) {
    static_assert(sizeof(T) <= 8);
    const size_t thread = threadIdx.x;
    Barrier& barrier = warp_barriers_[thread / 32];
    std::memcpy(&slots_[thread], &value, sizeof(T));
    wait(barrier);
    const auto result = read([&](size_t lane) {
      T other;
      std::memcpy(&other, &slots_[thread / 32 * 32 + lane], sizeof(T));
      return other;
    });
    wait(barrier);
    return result;
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;

  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  struct Barrier {
    int size, arrived, generation;
  };

  void prepare(Fiber& fiber) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(
        &fiber.context, [] { current_->enter(); }, 0);
  }

  // Runs a fiber up to where it waits or ends; true when it has ended.
  bool step(size_t thread) {
    threadIdx.x = static_cast<unsigned>(thread);
    swapcontext(&scheduler_, &fibers_[thread].context);
    return fibers_[thread].done;
  }

  void enter() {
    const size_t thread = threadIdx.x;
    body_();
    fibers_[thread].done = true;
  }

  void wait(Barrier& barrier) {
    const unsigned thread = threadIdx.x;
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    for (int turns = 0; barrier.generation == generation; ++turns) {
      if (turns > 100000) throw std::logic_error("a thread waits at a barrier for ever");
      swapcontext(&fibers_[thread].context, &scheduler_);
      threadIdx.x = thread;
    }
  }

  static inline EmulatedBlock* current_ = nullptr;

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_{};
  Barrier block_barrier_{};
  std::vector<Barrier> warp_barriers_;
  std::vector<uint64_t> slots_;
};

inline void emulate(int64_t blocks, int threads, const std::function<void()>& body) {
  EmulatedBlock block(threads, body);
  for (int64_t i = 0; i < blocks; ++i) block.run(static_cast<unsigned>(i));
}

// ---- the device's functions ---------------------------------------------------------------------

inline void __syncthreads() { EmulatedBlock::current().wait_for_block(); }

inline void __syncwarp() {
  EmulatedBlock::current().exchange(0, [](auto) { return 0; });
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}
template <typename T>
T atomicOr(T* to, T value) {
  const T old = *to;
  *to |= value;
  return old;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return EmulatedBlock::current().exchange(
      value, [&](auto lane_value) { return lane_value(static_cast<size_t>(lane)); });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const size_t lane = threadIdx.x % 32;
  return EmulatedBlock::current().exchange(
      value, [&](auto lane_value) { return lane_value(lane ^ static_cast<size_t>(mask)); });
}

// A lane that has no lane so far below it gets its own value.
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const size_t lane = threadIdx.x % 32, below = static_cast<size_t>(distance);
  return EmulatedBlock::current().exchange(
      value, [&](auto lane_value) { return lane_value(lane >= below ? lane - below : lane); });
}

template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return EmulatedBlock::current().exchange(value, [](auto lane_value) {
    T largest = lane_value(0);
    for (size_t lane = 1; lane < 32; ++lane) largest = std::max(largest, lane_value(lane));
    return largest;
  });
}

template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return EmulatedBlock::current().exchange(value, [](auto lane_value) {
    T sum = 0;
    for (size_t lane = 0; lane < 32; ++lane) sum += lane_value(lane);
    return sum;
  });
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return EmulatedBlock::current().exchange(value, [](auto lane_value) {
    unsigned all = 0;
    for (size_t lane = 0; lane < 32; ++lane) all |= lane_value(lane);
    return all;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return EmulatedBlock::current().exchange(value, [](auto lane_value) {
    unsigned lanes = 0;
    for (size_t lane = 0; lane < 32; ++lane) lanes |= unsigned{lane_value(lane)} << lane;
    return lanes;
  });
}

inline unsigned __match_any_sync(unsigned, int value) {
  const size_t mine = threadIdx.x % 32;
  unsigned peers = 0;
  EmulatedBlock::current().exchange(value, [&](auto lane_value) {
    for (size_t lane = 0; lane < 32; ++lane) {
      peers |= static_cast<unsigned>(lane_value(lane) == lane_value(mine)) << lane;
    }
    return 0;
  });
  return peers;
}

inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }

inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

inline int __popc(unsigned value) { return std::popcount(value); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}

}  // namespace anymask::cuda
