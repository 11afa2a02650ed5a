#include "cuda/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <filesystem>

namespace anymask::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestMajor = 12;
constexpr int kNewestMajor = 13;

// A driver cannot load code from a newer major version of the compiler. Its own comes first.
std::vector<int> majors_to_try(int driver_version) {
  const int newest = driver_version > 0 ? driver_version / 1000 : kNewestMajor;
  std::vector<int> majors;
  for (int major = newest; major >= kOldestMajor; --major) majors.push_back(major);
  return majors;
}

std::string path_of(void* library, const std::string& fallback) {
  link_map* map = nullptr;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr || *map->l_name == '\0') {
    return fallback;
  }
  return map->l_name;
}

// libnvrtc opens libnvrtc-builtins by its bare name. The wheels give it no run path, so that
// succeeds only when the library beside it is in the process already.
void open_builtins(const fs::path& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("libnvrtc-builtins.so.")) {
      dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
}

void* open_file(const fs::path& file, std::string& looked) {
  std::error_code error;
  if (!fs::exists(file, error)) return nullptr;
  open_builtins(file.parent_path());
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) looked += std::string("\n  ") + dlerror();
  return library;
}

std::vector<fs::path> folders_to_try(const NvrtcSearch& search, int major) {
  std::vector<fs::path> folders;
  for (const fs::path folder : search.folders) {
    folders.push_back(folder / "nvidia" / ("cu" + std::to_string(major)) / "lib");
    folders.push_back(folder / "nvidia" / "cuda_nvrtc" / "lib");
    folders.push_back(folder);
  }
  for (const fs::path root : search.roots) {
    folders.push_back(root / "lib64");
    folders.push_back(root / "lib");
    folders.push_back(root / "targets" / "x86_64-linux" / "lib");
  }
  return folders;
}

void* open_library(const NvrtcSearch& search, std::string& path, std::string& looked) {
  if (!search.file.empty()) {
    path = search.file;
    looked += "\n  " + search.file + " (ANYMASK_NVRTC)";
    return open_file(search.file, looked);
  }
  for (const int major : majors_to_try(search.driver_version)) {
    const std::string name = "libnvrtc.so." + std::to_string(major);
    if (search.system) {
      path = name;
      if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD)) return library;
    }
    const std::vector<fs::path> folders = folders_to_try(search, major);
    const size_t told = search.folders.size() * 3;
    for (size_t i = 0; i <= folders.size(); ++i) {
      if (i == told && search.system) {
        path = name;
        looked += "\n  the system loader (" + name + ")";
        if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
      }
      if (i == folders.size()) break;
      path = folders[i] / name;
      looked += "\n  " + path;
      if (void* library = open_file(path, looked)) return library;
    }
  }
  return nullptr;
}

}  // namespace

std::string open_nvrtc(const NvrtcSearch& search, Nvrtc& nvrtc) {
  std::string looked;
  void* library = open_library(search, nvrtc.path, looked);
  if (library == nullptr) {
    const int major = majors_to_try(search.driver_version).empty()
                          ? kNewestMajor
                          : majors_to_try(search.driver_version).front();
    return "NVRTC, the run-time compiler of CUDA, was not found. Install it with: pip install "
           "\"nvidia-cuda-nvrtc" +
           std::string(major <= 12 ? "-cu12\"" : "==" + std::to_string(major) + ".*\"") +
           ", or set ANYMASK_NVRTC to the path of libnvrtc.so. Looked for:" + looked;
  }
  std::string missing;
#define ANYMASK_LOAD(name, parameters)                                     \
  nvrtc.name = reinterpret_cast<int(*) parameters>(dlsym(library, #name)); \
  if (nvrtc.name == nullptr) missing = #name;
  ANYMASK_NVRTC_FUNCTIONS(ANYMASK_LOAD)
#undef ANYMASK_LOAD
  nvrtc.nvrtcGetErrorString =
      reinterpret_cast<const char* (*)(int)>(dlsym(library, "nvrtcGetErrorString"));
  if (nvrtc.nvrtcGetErrorString == nullptr) missing = "nvrtcGetErrorString";
  if (!missing.empty()) return "NVRTC at " + nvrtc.path + " lacks " + missing;
  nvrtc.path = path_of(library, nvrtc.path);
  int major = 0, minor = 0;
  nvrtc.nvrtcVersion(&major, &minor);
  nvrtc.version = 1000 * major + minor;
  return "";
}

}  // namespace anymask::cuda
