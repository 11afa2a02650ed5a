// What the CUDA backend found on this machine, for `anymask doctor` and for whoever asks why a GPU
// is not used.
#pragma once

#include <string>

namespace anymask::cuda {

// JSON, one object:
//   driver    {"version": "13.0"} or {"problem": why there is none}
//   gpus      [{"index", "name", "capability": "9.0", "multiprocessors", "memory_bytes"}]
//   compiler  {"version": "13.0", "path"} or {"problem"}
//   package_cache, user_cache  {"path", "files", "bytes"}
//   kernels   how many variants a warm-up compiles
// Throws nothing for what is missing.
std::string report_json();

}  // namespace anymask::cuda
