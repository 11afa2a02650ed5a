// Device headers embedded in the library, as NVRTC wants them: names and texts.
#pragma once

#include <span>
#include <string_view>
#include <vector>

namespace anymask::cuda {

struct SourceFile {
  const char* name;  // as in #include "...": relative to src/
  const char* text;
};

// All of them, sorted by name. Written at build time by embed.cmake.
std::span<const SourceFile> embedded_sources();

// `name` and every header that it includes, directly or not, each once. Throws RuntimeFailure when
// one is not embedded.
std::vector<SourceFile> source_closure(std::string_view name);

}  // namespace anymask::cuda
