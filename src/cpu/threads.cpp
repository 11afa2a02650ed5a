#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace anymask::cpu {
namespace {

int default_threads() {
  if (const char* wanted = std::getenv("ANYMASK_CPU_THREADS")) {
    const int count = std::atoi(wanted);
    if (count > 0) return std::min(count, 1024);
  }
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

using Task = std::function<void(int64_t, int)>;

// One parallel loop. Helpers hold it by shared pointer: one that wakes late finds it finished.
struct Loop {
  const Task* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> unfinished;
  std::mutex failing;
  std::exception_ptr failure;

  Loop(const Task* the_task, int64_t the_count)
      : task(the_task), count(the_count), unfinished(the_count) {}

  void work(int thread) {
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      try {
        (*task)(index, thread);
      } catch (...) {
        const std::lock_guard lock(failing);
        if (failure == nullptr) failure = std::current_exception();
      }
      unfinished.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
};

thread_local bool inside_task = false;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
      helpers_.emplace_back([this, i] { help(i); });
    }
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }
  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  void run(int64_t count, const Task& task) {
    const auto loop = std::make_shared<Loop>(&task, count);
    {
      const std::lock_guard lock(mutex_);
      loop_ = loop;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    inside_task = true;
    loop->work(0);
    inside_task = false;
    for (int spins = 0; loop->unfinished.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        __builtin_ia32_pause();
      } else {
        std::this_thread::yield();
      }
    }
    {
      const std::lock_guard lock(mutex_);
      loop_ = nullptr;
    }
    if (loop->failure != nullptr) std::rethrow_exception(loop->failure);
  }

 private:
  // About 20 microseconds: the next loop of one call comes sooner, the next call mostly does not.
  static constexpr int kSpins = 500;

  void help(int thread) {
    inside_task = true;
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen;
           ++spins) {
        __builtin_ia32_pause();
      }
      std::shared_ptr<Loop> loop;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
        seen = round_.load(std::memory_order_relaxed);
        if (stopping_) return;
        loop = loop_;
      }
      if (loop != nullptr) loop->work(thread);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::shared_ptr<Loop> loop_;
  bool stopping_ = false;
  std::vector<std::thread> helpers_;
};

// ---- the process's own OpenMP team --------------------------------------------------------------
//
// Torch's OpenMP threads spin for some 5 ms after each of its operators, on the cores that ours
// would want next: a forward pass of 11.3 ms took 15.0 behind a torch operator. Where a process has
// an OpenMP runtime (GNU's, or LLVM's and Intel's, which have the same entry point), its threads do
// the work instead.

using RunTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};  // a child of fork() must not touch its parent's team

RunTeam openmp_team() {
  static std::atomic<RunTeam> found{nullptr};
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  RunTeam run = found.load(std::memory_order_relaxed);
  if (run == nullptr) {  // asked for again each time: torch may be imported later
    run = reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(run, std::memory_order_relaxed);
  }
  return run;
}

void run_on_team(RunTeam run, int threads, int64_t count, const Task& task) {
  struct Shared {
    Loop loop;
    std::atomic<int> next_thread{0};
  } shared{{&task, count}};
  const auto body = [](void* data) {
    auto& mine = *static_cast<Shared*>(data);
    inside_task = true;
    mine.loop.work(mine.next_thread.fetch_add(1, std::memory_order_relaxed));
    inside_task = false;
  };
  run(body, &shared, static_cast<unsigned>(threads), 0);
  if (shared.loop.failure != nullptr) std::rethrow_exception(shared.loop.failure);
}

// ---- the pool and its users ---------------------------------------------------------------------

// Guards the pool and lets one loop run at a time. Never destroyed: at exit, threads may still run.
struct State {
  std::mutex running;
  std::atomic<int> wanted{0};
  Pool* pool = nullptr;
  pid_t process = 0;
};
State& state() {
  static State* const one = [] {
    auto* fresh = new State;
    // A child of fork() has none of the parent's threads: it forgets the pool (whose locks may be
    // held by threads that are no more) and builds its own when it needs one.
    pthread_atfork(nullptr, nullptr, [] {
      State& mine = state();
      new (&mine.running) std::mutex;
      mine.pool = nullptr;
      inside_task = false;
      forked.store(true);
    });
    return fresh;
  }();
  return *one;
}

}  // namespace

void set_threads(int threads) { state().wanted.store(std::clamp(threads, 0, 1024)); }

int threads() {
  const int wanted = state().wanted.load(std::memory_order_relaxed);
  if (wanted > 0) return wanted;
  static const int fallback = default_threads();
  return fallback;
}

void parallel_for(int64_t count, const Task& task, int team) {
  if (count <= 0) return;
  const int wanted = team > 0 ? team : threads();
  if (inside_task || wanted == 1 || count == 1) {
    const bool outer = !inside_task;
    inside_task = true;
    struct Leave {
      bool outer;
      ~Leave() { inside_task = !outer; }
    } leave{outer};
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  State& shared = state();
  const std::lock_guard lock(shared.running);
  if (const RunTeam run = openmp_team()) return run_on_team(run, wanted, count, task);
  if (shared.pool != nullptr && shared.pool->threads() != wanted) {
    delete shared.pool;
    shared.pool = nullptr;
  }
  if (shared.pool == nullptr) shared.pool = new Pool(wanted);
  shared.pool->run(count, task);
}

}  // namespace anymask::cpu
