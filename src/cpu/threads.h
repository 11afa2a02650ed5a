// Loops on all cores: on the process's OpenMP team where it has one (torch brings one), else on a
// small pool of the library's own. An OpenMP runtime inside the wheel would fight with torch's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace anymask::cpu {

// 0: one thread per core that this process may use (or ANYMASK_CPU_THREADS).
void set_threads(int threads);
int threads();

// Calls task(index, thread) for 0 <= index < count, each index once, on all threads; indices are
// handed out in increasing order. Returns when all are done; the first exception is rethrown here.
// Calls from several threads at once run one after the other; a call from inside a task runs
// serially. `team`: the number of threads, for callers that have reserved memory for each of them;
// 0: threads(), which another thread may change at any time.
void parallel_for(int64_t count, const std::function<void(int64_t index, int thread)>& task,
                  int team = 0);

// Calls body(index) likewise, `group` neighbours a task: for calls that are too short to wake a
// thread for (20 us and more, milliseconds where other processes want its core).
template <class Body>
void parallel_in_groups(int64_t count, int64_t group, const Body& body) {
  parallel_for((count + group - 1) / group, [&](int64_t task, int) {
    const int64_t end = std::min(count, (task + 1) * group);
    for (int64_t index = task * group; index < end; ++index) body(index);
  });
}

}  // namespace anymask::cpu
