// The CUDA backend as a whole: what was found, and kernels compiled ahead of time.
#pragma once

#include <string>

namespace anymask {

// What was found, as one JSON object:
//   driver    {"version": "13.0"} or {"problem": why there is none}
//   gpus      [{"index", "name", "capability": "9.0", "multiprocessors", "memory_bytes"}]
//   compiler  {"version": "13.0", "path"} or {"problem"}
//   package_cache, user_cache  {"path", "files", "bytes"}
//   kernels   how many variants warm_up_cuda compiles
std::string cuda_report();

// Compiles every kernel that a GPU of compute capability `capability` (90 for 9.0) runs into the
// user cache, unless a cache has it; returns how many there are. Needs NVRTC, no GPU.
int warm_up_cuda(int capability = 90);

// A folder to look in for NVRTC before the system's own (a site-packages folder, or one that holds
// libnvrtc); and the read-only folder of kernels that came with the library. Both before first use.
void add_cuda_library_folder(const std::string& folder);
void set_cuda_package_cache(const std::string& folder);

}  // namespace anymask
