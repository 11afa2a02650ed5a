// Kernels: from a small config to something that can be launched.
//
// A kernel is a device function template over a C++20 class-type parameter, in a header under
// src/cuda/device/ that is embedded in the library. Asking for a variant generates one translation
// unit, compiles it (or finds it in the cache) and loads it; asking again is a look-up.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "cuda/cache.h"
#include "cuda/driver.h"

namespace anymask::cuda {

// What all variants of a kernel share. Static storage: configs point here.
struct KernelFamily {
  const char* name;    // in file names and messages: "forward"
  const char* header;  // embedded header: "cuda/device/sm90/forward.h"
  const char* config;  // type of the template argument: "anymask::cuda::ForwardConfig"; nullptr:
                       // the function is no template
  const char* params;  // type of the one parameter: "anymask::cuda::ForwardParams"
  const char*
      function;     // "anymask::cuda::forward_kernel", called as forward_kernel<kConfig>(params)
  int capability;   // the only compute capability it runs on, 90 for 9.0; 0: any from 8.0 on
  bool matrix;      // multiplies matrices: the kernel check wants wgmma and bulk tensor copies
  int param_bytes;  // sizeof(params) as the host sees it; the device compiler compares
};

inline constexpr int kMaxConfigValues = 32;

// One variant. The values are the fields of the family's config type, in order: an aggregate of
// integers and bools, without default member initialisers that a value here would not repeat.
struct KernelConfig {
  const KernelFamily* family = nullptr;
  std::array<int32_t, kMaxConfigValues> values{};
  int32_t count = 0;         // how many of them
  int32_t threads = 0;       // of a block, as in __launch_bounds__
  int32_t min_blocks = 1;    // a multiprocessor, likewise
  int32_t shared_bytes = 0;  // dynamic shared memory

  auto operator<=>(const KernelConfig&) const = default;
};

// A loaded variant, ready to launch on one device.
struct Kernel {
  KernelConfig config;
  int ordinal = 0;
  CuKernel handle = nullptr;
};

// Compiles, loads and prepares on first use; afterwards a look-up. Safe from any thread and inside
// a stream capture. The reference stays valid until the process ends.
const Kernel& kernel(const KernelConfig& config, int ordinal);

// Sees to it that kernel() has these at once: what is to be compiled is compiled side by side. A
// null pointer stands for none.
void load_together(std::initializer_list<const KernelConfig*> configs, int ordinal);

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

void launch_raw(const Kernel& kernel, Grid grid, CuStream stream, const void* params);

// Launches on `stream`; a context of the kernel's device must be current (DeviceScope).
template <typename Params>
void launch(const Kernel& kernel, Grid grid, CuStream stream, const Params& params) {
  launch_raw(kernel, grid, stream, &params);
}

// The name of a kernel's entry point, which profilers show: "anymask_forward".
std::string kernel_entry(const KernelFamily& family);

// The translation unit of a variant.
std::string kernel_source(const KernelConfig& config);

// "forward<128, 128, 1>": for messages and reports.
std::string kernel_title(const KernelConfig& config);

// The machine code of a variant for a compute capability: from the cache, or compiled and put into
// the user cache. Needs no GPU.
CachedKernel kernel_code(const KernelConfig& config, int capability);

// Compiles a variant, whatever the caches hold.
CachedKernel build_kernel(const KernelConfig& config, int capability);

// Compiles a variant and puts it into a package layer that is being made.
CachedKernel ship_kernel(const KernelConfig& config, int capability, const CacheFolder& folder);

// Every variant that a release ships compiled (registry.cpp).
std::vector<KernelConfig> registered_kernels();

// Calls `action` with each of them, on as many threads as there are cores; then throws the last
// exception that one of them threw, if any.
void for_each_kernel(const std::function<void(const KernelConfig&)>& action);

// Compiles those of them that `capability` runs into the user cache, unless they are in a cache
// already; returns how many there are. Needs no GPU.
int warm_up(int capability);

}  // namespace anymask::cuda
