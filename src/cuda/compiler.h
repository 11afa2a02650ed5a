// NVRTC, found and opened at run time: device source in, machine code out.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "cuda/sources.h"

namespace anymask::cuda {

// A folder to look in for libnvrtc, before the system's own: a site-packages folder (whose
// nvidia/cu13/lib or nvidia/cuda_nvrtc/lib is meant) or one that holds the library itself. Takes
// effect until NVRTC has been opened.
void add_library_folder(const std::string& folder);

struct CompilerInfo {
  std::string path;
  int version = 0;  // 13005 for NVRTC 13.5
};

// Opens NVRTC on the first call. Throws Unsupported, saying how to install it and where it was
// looked for; a later call tries again.
CompilerInfo compiler_info();

// Why compiler_info() would throw; empty when it would not.
std::string compiler_problem();

struct Compiled {
  std::string cubin;
  std::string log;
};

// `name` is for messages. Throws RuntimeFailure with the compiler's log when the source is wrong.
Compiled compile(const std::string& name, const std::string& source,
                 std::span<const SourceFile> headers, std::span<const std::string> options);

// The options for a compute capability, 90 for 9.0.
std::vector<std::string> compile_options(int capability);

// What the machine-code generator said of a kernel.
struct CompileReport {
  int registers = 0;
  int stack_bytes = 0;
  int spill_store_bytes = 0;
  int spill_load_bytes = 0;
  std::vector<std::string> advisories;  // lines that carry a C75xx code
};
CompileReport read_compile_log(const std::string& log);

}  // namespace anymask::cuda
