#include "cuda/sources.h"

#include <algorithm>
#include <string>

#include "anymask/error.hpp"

namespace anymask::cuda {
namespace {

const SourceFile& embedded(std::string_view name) {
  for (const SourceFile& file : embedded_sources()) {
    if (name == file.name) return file;
  }
  throw RuntimeFailure("CUDA: device header \"" + std::string(name) +
                       "\" is not embedded in the library");
}

void collect(std::string_view name, std::vector<SourceFile>& found) {
  for (const SourceFile& file : found) {
    if (name == file.name) return;
  }
  const SourceFile& file = embedded(name);
  found.push_back(file);
  constexpr std::string_view kInclude = "#include \"";
  const std::string_view text = file.text;
  for (size_t at = text.find(kInclude); at != text.npos; at = text.find(kInclude, at)) {
    const bool starts_line = at == 0 || text[at - 1] == '\n';
    at += kInclude.size();
    const size_t end = text.find('"', at);
    if (starts_line && end != text.npos) collect(text.substr(at, end - at), found);
  }
}

}  // namespace

std::vector<SourceFile> source_closure(std::string_view name) {
  std::vector<SourceFile> found;
  collect(name, found);
  std::sort(found.begin(), found.end(), [](const SourceFile& a, const SourceFile& b) {
    return std::string_view(a.name) < std::string_view(b.name);
  });
  return found;
}

}  // namespace anymask::cuda
