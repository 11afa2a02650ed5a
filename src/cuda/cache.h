// The cache of compiled kernels on disk: one file a kernel, in two layers.
//
// The package layer is read-only and comes with the library; the user layer is written at run time
// (ANYMASK_CACHE_DIR, else XDG_CACHE_HOME/anymask, else ~/.cache/anymask). Any number of threads
// and processes may use them at once: a file appears whole, by renaming, and is never changed. A
// file that fails its checksum counts as absent and is replaced.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "cuda/compiler.h"
#include "cuda/sha256.h"

namespace anymask::cuda {

struct CachedKernel {
  Compiled code;
  int compiler_version = 0;
};

class CacheFolder {
 public:
  CacheFolder() = default;  // holds nothing, takes nothing
  explicit CacheFolder(std::filesystem::path folder) : folder_(std::move(folder)) {}

  const std::filesystem::path& path() const { return folder_; }

  // nullopt when the file is absent, damaged or of another key.
  std::optional<CachedKernel> load(const std::string& name, const Digest& key) const;

  // False when the folder cannot be written: a cache is a help, not a need.
  bool store(const std::string& name, const Digest& key, const CachedKernel& kernel) const;

  std::filesystem::path file(const std::string& name, const Digest& key) const;

  struct Contents {
    int64_t files = 0;
    int64_t bytes = 0;
  };
  Contents contents() const;

 private:
  std::filesystem::path folder_;
};

// What the code depends on apart from the compiler: every text and option that goes into it.
Digest source_key(const std::string& source, std::span<const SourceFile> headers,
                  std::span<const std::string> options);
Digest with_compiler(const Digest& key, int compiler_version);

// The layers of this process. The package folder is told by whoever knows where the package is
// installed (set_package_cache), before the first kernel; the environment is read once.
void set_package_cache(const std::string& folder);
const CacheFolder& package_cache();
const CacheFolder& user_cache();

}  // namespace anymask::cuda
