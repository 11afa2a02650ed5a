// NVRTC's functions and the search for its library; compiler.h is what others use.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace anymask::cuda {

using NvrtcProgram = struct NvrtcProgramObject*;

#define ANYMASK_NVRTC_FUNCTIONS(F)                                                             \
  F(nvrtcVersion, (int* major, int* minor))                                                    \
  F(nvrtcCreateProgram,                                                                        \
    (NvrtcProgram * program, const char* source, const char* name, int header_count,           \
     const char* const* headers, const char* const* header_names))                             \
  F(nvrtcCompileProgram, (NvrtcProgram program, int option_count, const char* const* options)) \
  F(nvrtcGetProgramLogSize, (NvrtcProgram program, size_t * bytes))                            \
  F(nvrtcGetProgramLog, (NvrtcProgram program, char* log))                                     \
  F(nvrtcGetCUBINSize, (NvrtcProgram program, size_t * bytes))                                 \
  F(nvrtcGetCUBIN, (NvrtcProgram program, char* cubin))                                        \
  F(nvrtcDestroyProgram, (NvrtcProgram * program))

struct Nvrtc {
#define ANYMASK_DECLARE(name, parameters) int(*name) parameters;
  ANYMASK_NVRTC_FUNCTIONS(ANYMASK_DECLARE)
#undef ANYMASK_DECLARE
  const char* (*nvrtcGetErrorString)(int result);
  std::string path;
  int version;  // 13005 for 13.5
};

// Where to look, apart from what the process has loaded and what the system loader knows.
struct NvrtcSearch {
  std::string file;                  // one library and no other: $ANYMASK_NVRTC
  std::vector<std::string> folders;  // site-packages or library folders
  std::vector<std::string> roots;    // $CONDA_PREFIX, $CUDA_HOME, ...: their lib folders
  int driver_version = 0;            // 0: no driver
  bool system = true;                // ask the process and the system loader too
};

// Fills `nvrtc` and returns "", or returns what is missing and where it was looked for.
std::string open_nvrtc(const NvrtcSearch& search, Nvrtc& nvrtc);

}  // namespace anymask::cuda
