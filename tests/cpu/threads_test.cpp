#include "cpu/threads.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace anymask::cpu {
namespace {

class Threads : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_threads(GetParam()); }
  void TearDown() override { set_threads(0); }
};

TEST_P(Threads, EachIndexOnce) {
  EXPECT_EQ(threads(), GetParam());
  for (const int64_t count : {0, 1, 2, 1000}) {
    std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
    parallel_for(count, [&](int64_t index, int thread) {
      ++calls[static_cast<size_t>(index)];
      EXPECT_GE(thread, 0);
      EXPECT_LT(thread, GetParam());
    });
    for (const auto& one : calls) EXPECT_EQ(one.load(), 1);
  }
}

// What the backward pass rests on: when an index is handed out, all lower ones have been.
TEST_P(Threads, HandedOutInOrder) {
  std::vector<std::atomic<bool>> done(500);
  parallel_for(500, [&](int64_t index, int) {
    if (index > 0) {
      while (!done[static_cast<size_t>(index - 1)].load()) std::this_thread::yield();
    }
    done[static_cast<size_t>(index)] = true;
  });
  EXPECT_TRUE(done.back().load());
}

TEST_P(Threads, ExceptionsComeBack) {
  std::atomic<int> calls{0};
  EXPECT_THROW(parallel_for(100,
                            [&](int64_t index, int) {
                              ++calls;
                              if (index == 13) throw std::runtime_error("thirteen");
                            }),
               std::runtime_error);
  std::atomic<int> after{0};
  parallel_for(10, [&](int64_t, int) { ++after; });
  EXPECT_EQ(after.load(), 10);
}

TEST_P(Threads, NestedCallsRunSerially) {
  std::atomic<int> calls{0};
  parallel_for(8, [&](int64_t, int) {
    parallel_for(8, [&](int64_t, int thread) {
      EXPECT_EQ(thread, 0);
      ++calls;
    });
  });
  EXPECT_EQ(calls.load(), 64);
}

TEST_P(Threads, CallersTakeTurns) {
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        parallel_for(20, [&](int64_t index, int) { sum += index; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum.load(), 4 * 50 * 190);
}

TEST_P(Threads, SurviveFork) {
  std::atomic<int> calls{0};
  parallel_for(10, [&](int64_t, int) { ++calls; });
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> own{0};
    parallel_for(10, [&](int64_t, int) { ++own; });
    _exit(own.load() == 10 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  parallel_for(10, [&](int64_t, int) { ++calls; });
  EXPECT_EQ(calls.load(), 20);
}

INSTANTIATE_TEST_SUITE_P(Counts, Threads, ::testing::Values(1, 2, 3, 7));

}  // namespace
}  // namespace anymask::cpu
