#include "cuda/compiler.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <sstream>

#include "anymask/error.hpp"
#include "cuda/driver.h"
#include "cuda/nvrtc.h"

namespace anymask::cuda {
namespace {

std::mutex& compiler_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::vector<std::string>& told_folders() {
  static std::vector<std::string> folders;
  return folders;
}

NvrtcSearch search_of_process() {
  NvrtcSearch search;
  if (const char* file = std::getenv("ANYMASK_NVRTC")) search.file = file;
  search.folders = told_folders();
  for (const char* variable : {"CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH"}) {
    if (const char* root = std::getenv(variable)) search.roots.push_back(root);
  }
  search.roots.push_back("/usr/local/cuda");
  if (driver_problem().empty()) search.driver_version = driver().version;
  return search;
}

// The opened library, or nullptr and the reason. A success is final, a failure is tried again.
const Nvrtc* find_nvrtc(std::string* problem) {
  static std::atomic<const Nvrtc*> ready{nullptr};
  static Nvrtc storage;
  if (const Nvrtc* found = ready.load(std::memory_order_acquire)) return found;
  const std::lock_guard lock(compiler_mutex());
  if (const Nvrtc* found = ready.load(std::memory_order_acquire)) return found;
  *problem = open_nvrtc(search_of_process(), storage);
  if (!problem->empty()) return nullptr;
  ready.store(&storage, std::memory_order_release);
  return &storage;
}

const Nvrtc& nvrtc() {
  std::string problem;
  const Nvrtc* found = find_nvrtc(&problem);
  if (found == nullptr) throw Unsupported("CUDA: " + problem);
  return *found;
}

void check_nvrtc(int result, const char* what) {
  if (result != 0) {
    throw RuntimeFailure(std::string("NVRTC: ") + what + ": " +
                         nvrtc().nvrtcGetErrorString(result));
  }
}

// Owns an NVRTC program.
struct Program {
  NvrtcProgram handle = nullptr;
  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (handle != nullptr) nvrtc().nvrtcDestroyProgram(&handle);
  }
};

std::string log_of(const Program& program) {
  size_t bytes = 0;
  check_nvrtc(nvrtc().nvrtcGetProgramLogSize(program.handle, &bytes), "nvrtcGetProgramLogSize");
  std::string log(bytes, '\0');
  check_nvrtc(nvrtc().nvrtcGetProgramLog(program.handle, log.data()), "nvrtcGetProgramLog");
  while (!log.empty() && log.back() == '\0') log.pop_back();
  return log;
}

// The number that stands before `unit` in `line`, 0 when there is none.
int number_before(const std::string& line, const std::string& unit) {
  const size_t end = line.find(unit);
  if (end == std::string::npos) return 0;
  const size_t begin = line.find_last_not_of("0123456789", end - 1) + 1;
  return begin < end ? std::stoi(line.substr(begin, end - begin)) : 0;
}

}  // namespace

void add_library_folder(const std::string& folder) {
  const std::lock_guard lock(compiler_mutex());
  told_folders().push_back(folder);
}

CompilerInfo compiler_info() { return {nvrtc().path, nvrtc().version}; }

std::string compiler_problem() {
  std::string problem;
  find_nvrtc(&problem);
  return problem;
}

Compiled compile(const std::string& name, const std::string& source,
                 std::span<const SourceFile> headers, std::span<const std::string> options) {
  std::vector<const char*> texts, names, arguments;
  for (const SourceFile& header : headers) {
    texts.push_back(header.text);
    names.push_back(header.name);
  }
  for (const std::string& option : options) arguments.push_back(option.c_str());

  Program program;
  check_nvrtc(
      nvrtc().nvrtcCreateProgram(&program.handle, source.c_str(), name.c_str(),
                                 static_cast<int>(texts.size()), texts.data(), names.data()),
      "nvrtcCreateProgram");
  const int result = nvrtc().nvrtcCompileProgram(program.handle, static_cast<int>(arguments.size()),
                                                 arguments.data());
  Compiled compiled;
  compiled.log = log_of(program);
  if (result != 0) {
    throw RuntimeFailure("NVRTC could not compile " + name + ": " +
                         nvrtc().nvrtcGetErrorString(result) + "\n" + compiled.log);
  }
  size_t bytes = 0;
  check_nvrtc(nvrtc().nvrtcGetCUBINSize(program.handle, &bytes), "nvrtcGetCUBINSize");
  compiled.cubin.resize(bytes);
  check_nvrtc(nvrtc().nvrtcGetCUBIN(program.handle, compiled.cubin.data()), "nvrtcGetCUBIN");
  return compiled;
}

std::vector<std::string> compile_options(int capability) {
  // 9.0 has instructions (wgmma, setmaxnreg) that only its own "a" target offers.
  const std::string suffix = capability == 90 ? "a" : "";
  return {"--std=c++20", "--device-as-default-execution-space",
          "--gpu-architecture=sm_" + std::to_string(capability) + suffix, "--ptxas-options=-v"};
}

CompileReport read_compile_log(const std::string& log) {
  CompileReport report;
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    report.registers = std::max(report.registers, number_before(line, " registers"));
    report.stack_bytes = std::max(report.stack_bytes, number_before(line, " bytes stack frame"));
    report.spill_store_bytes =
        std::max(report.spill_store_bytes, number_before(line, " bytes spill stores"));
    report.spill_load_bytes =
        std::max(report.spill_load_bytes, number_before(line, " bytes spill loads"));
    if (line.find("(C75") != std::string::npos) report.advisories.push_back(line);
  }
  return report;
}

}  // namespace anymask::cuda
