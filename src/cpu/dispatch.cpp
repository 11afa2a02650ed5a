// Which kernels run: chosen by cpuid, or by name for tests and benchmarks.
#include <cpuid.h>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

#include "anymask/error.hpp"
#include "cpu/backend.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/view.h"

namespace anymask::cpu {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// The compiler's own list has this name only from GCC 9 and Clang 14 on: leaf 7.1, EAX bit 5.
bool has_avx512bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;
}

// From the slowest to the fastest.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    __builtin_cpu_init();
    std::vector<const Kernels*> list{baseline_kernels()};
    if (has_avx2()) list.push_back(avx2_kernels());
    if (has_avx512()) list.push_back(avx512_kernels());
    if (has_avx512bf16()) list.push_back(avx512bf16_kernels());
    return list;
  }();
  return found;
}

const Kernels* by_name(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* wanted = std::getenv("ANYMASK_CPU_ISA");
    const Kernels* named = wanted == nullptr ? nullptr : by_name(wanted);
    return named != nullptr ? named : available().back();
  }();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

std::string instruction_set() { return kernels().name; }

void set_instruction_set(const std::string& name) {
  const Kernels* named = by_name(name);
  if (named == nullptr) {
    std::string names;
    for (const std::string& one : instruction_sets()) names += (names.empty() ? "" : ", ") + one;
    throw InvalidValue("instruction set: got \"" + name + "\", this machine has " + names);
  }
  chosen().store(named, std::memory_order_relaxed);
}

plan::TileShapes tile_shapes(const Problem&) { return {{128, 128}, {64, 128}}; }

double measure_peak(DType dtype) {
  const auto spin = kernels().spin[static_cast<int>(element_of(dtype))];
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  std::vector<double> rate(static_cast<size_t>(threads()));
  // Each thread for 50 ms; the best of its 5 ms pieces is what no other process disturbed.
  parallel_for(threads(), [&](int64_t index, int) {
    int64_t rounds = 1 << 14;
    const auto begin = Clock::now();
    double best = 0;
    while (seconds(begin) < 0.05) {
      const auto start = Clock::now();
      const double operations = spin(rounds);
      const double taken = seconds(start);
      if (taken < 0.004) {
        rounds *= 2;
      } else {
        best = std::max(best, operations / taken);
      }
    }
    rate[static_cast<size_t>(index)] = best;
  });
  double total = 0;
  for (const double one : rate) total += one;
  return total * 1e-9;
}

}  // namespace anymask::cpu
