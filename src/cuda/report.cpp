#include "cuda/report.h"

#include "cuda/kernel.h"

namespace anymask::cuda {
namespace {

std::string quoted(const std::string& text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (byte < 0x20) {
      result += "\\u00";
      result += kHex[byte >> 4];
      result += kHex[byte & 15];
    } else {
      result += c;
    }
  }
  return result + "\"";
}

// "9.0" from 9 and 0.
std::string dotted(int major, int minor) {
  return quoted(std::to_string(major) + "." + std::to_string(minor));
}

std::string problem_json(const std::string& problem) {
  return "{\"problem\": " + quoted(problem) + "}";
}

std::string driver_json() {
  const std::string problem = driver_problem();
  if (!problem.empty()) return problem_json(problem);
  const int version = driver().version;
  return "{\"version\": " + dotted(version / 1000, version % 1000 / 10) + "}";
}

std::string gpus_json() {
  std::string list;
  for (int i = 0; i < gpu_count(); ++i) {
    const Gpu& one = gpu(i);
    list += std::string(i > 0 ? ", " : "") + "{\"index\": " + std::to_string(i) +
            ", \"name\": " + quoted(one.name) +
            ", \"capability\": " + dotted(one.capability / 10, one.capability % 10) +
            ", \"multiprocessors\": " + std::to_string(one.multiprocessors) +
            ", \"memory_bytes\": " + std::to_string(one.memory_bytes) + "}";
  }
  return "[" + list + "]";
}

std::string compiler_json() {
  const std::string problem = compiler_problem();
  if (!problem.empty()) return problem_json(problem);
  const CompilerInfo info = compiler_info();
  return "{\"version\": " + dotted(info.version / 1000, info.version % 1000) +
         ", \"path\": " + quoted(info.path) + "}";
}

std::string cache_json(const CacheFolder& cache) {
  const CacheFolder::Contents contents = cache.contents();
  return "{\"path\": " + quoted(cache.path().string()) +
         ", \"files\": " + std::to_string(contents.files) +
         ", \"bytes\": " + std::to_string(contents.bytes) + "}";
}

}  // namespace

std::string report_json() {
  return "{\"driver\": " + driver_json() + ", \"gpus\": " + gpus_json() +
         ", \"compiler\": " + compiler_json() +
         ", \"package_cache\": " + cache_json(package_cache()) +
         ", \"user_cache\": " + cache_json(user_cache()) +
         ", \"kernels\": " + std::to_string(registered_kernels().size()) + "}";
}

}  // namespace anymask::cuda
