#include "cuda/kernel.h"

#include <atomic>
#include <future>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "anymask/error.hpp"

namespace anymask::cuda {
namespace {

std::string values_text(const KernelConfig& config) {
  std::string text;
  for (int32_t i = 0; i < config.count; ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(config.values[static_cast<size_t>(i)]);
  }
  return text;
}

// What goes into the compiler, and the key that it makes.
struct Unit {
  std::string source;
  std::vector<SourceFile> headers;
  std::vector<std::string> options;
  Digest key;

  Unit(const KernelConfig& config, int capability)
      : source(kernel_source(config)),
        headers(source_closure(config.family->header)),
        options(compile_options(capability)),
        key(source_key(source, headers, options)) {}

  CachedKernel build(const KernelConfig& config) const {
    return {compile(std::string(config.family->name) + ".cu", source, headers, options),
            compiler_info().version};
  }
};

CuKernel load_kernel(const KernelConfig& config, const Gpu& gpu) {
  const CachedKernel built = kernel_code(config, gpu.capability);
  const std::string title = kernel_title(config);
  CuLibrary library = nullptr;
  check(driver().cuLibraryLoadData(&library, built.code.cubin.data(), nullptr, nullptr, 0, nullptr,
                                   nullptr, 0),
        ("cuLibraryLoadData of " + title).c_str());
  CuKernel handle = nullptr;
  check(driver().cuLibraryGetKernel(&handle, library, kernel_entry(*config.family).c_str()),
        "cuLibraryGetKernel");
  if (config.shared_bytes > 0) {
    check(driver().cuKernelSetAttribute(CuFunctionAttribute::kMaxDynamicShared, config.shared_bytes,
                                        handle, gpu.handle),
          ("shared memory of " + title).c_str());
  }
  // Loads the code into the device's context now: later, at the first launch, it could fall into
  // a stream capture or between two timed calls.
  CuFunction function = nullptr;
  check(driver().cuKernelGetFunction(&function, handle), "cuKernelGetFunction");
  return handle;
}

void check_device(const KernelConfig& config, const Gpu& gpu) {
  const int wanted = config.family->capability;
  if (wanted != 0 ? gpu.capability == wanted : gpu.capability >= 80) return;
  const auto text = [](int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  };
  throw Unsupported(std::string("CUDA: the ") + config.family->name + " kernel needs compute " +
                    "capability " + (wanted != 0 ? text(wanted) : "8.0 or newer") +
                    "; cuda:" + std::to_string(gpu.ordinal) + " (" + gpu.name + ") has " +
                    text(gpu.capability));
}

struct Key {
  KernelConfig config;
  int ordinal;
  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = reinterpret_cast<uintptr_t>(key.config.family);
    const auto add = [&hash](int32_t value) {
      hash = (hash ^ static_cast<uint32_t>(value)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    };
    for (int32_t i = 0; i < key.config.count; ++i) add(key.config.values[static_cast<size_t>(i)]);
    add(key.ordinal);
    return hash;
  }
};

struct Entry {
  std::mutex mutex;  // one thread compiles, the others wait
  std::atomic<bool> ready{false};
  Kernel kernel;
};

// The entry of a key, made on first sight. Entries stay where they are until the process ends.
Entry& entry_of(const Key& key) {
  static std::shared_mutex mutex;
  static auto& entries = *new std::unordered_map<Key, std::unique_ptr<Entry>, KeyHash>;
  {
    const std::shared_lock lock(mutex);
    if (const auto found = entries.find(key); found != entries.end()) return *found->second;
  }
  const std::unique_lock lock(mutex);
  std::unique_ptr<Entry>& entry = entries[key];
  if (entry == nullptr) entry = std::make_unique<Entry>();
  return *entry;
}

}  // namespace

const Kernel& kernel(const KernelConfig& config, int ordinal) {
  Entry& entry = entry_of({config, ordinal});
  if (entry.ready.load(std::memory_order_acquire)) return entry.kernel;
  const std::lock_guard lock(entry.mutex);
  if (!entry.ready.load(std::memory_order_acquire)) {
    check_device(config, gpu(ordinal));
    const DeviceScope scope(ordinal);
    const CaptureGuard guard;
    entry.kernel = {config, ordinal, load_kernel(config, gpu(ordinal))};
    entry.ready.store(true, std::memory_order_release);
  }
  return entry.kernel;
}

void load_together(std::initializer_list<const KernelConfig*> configs, int ordinal) {
  std::vector<std::future<void>> late;
  for (const KernelConfig* config : configs) {
    if (config == nullptr || entry_of({*config, ordinal}).ready.load(std::memory_order_acquire)) {
      continue;
    }
    late.push_back(std::async(std::launch::async, [=] { kernel(*config, ordinal); }));
  }
  for (std::future<void>& one : late) one.get();
}

CachedKernel kernel_code(const KernelConfig& config, int capability) {
  const Unit unit(config, capability);
  const std::string name = config.family->name;
  // Code in the package does not depend on the compiler found here, so it serves machines that
  // have none. A driver loads code of its own major version or older.
  if (auto shipped = package_cache().load(name, unit.key)) {
    const int newest = driver_problem().empty() ? driver().version : shipped->compiler_version;
    if (shipped->compiler_version / 1000 <= newest / 1000) return *std::move(shipped);
  }
  const Digest key = with_compiler(unit.key, compiler_info().version);
  if (auto found = user_cache().load(name, key)) return *std::move(found);
  CachedKernel built = unit.build(config);
  user_cache().store(name, key, built);
  return built;
}

CachedKernel build_kernel(const KernelConfig& config, int capability) {
  return Unit(config, capability).build(config);
}

CachedKernel ship_kernel(const KernelConfig& config, int capability, const CacheFolder& folder) {
  const Unit unit(config, capability);
  CachedKernel built = unit.build(config);
  if (!folder.store(config.family->name, unit.key, built)) {
    throw RuntimeFailure("cannot write to the folder " + folder.path().string());
  }
  return built;
}

void launch_raw(const Kernel& kernel, Grid grid, CuStream stream, const void* params) {
  const CuLaunchConfig launch = {{grid.x, grid.y, grid.z},
                                 {static_cast<uint32_t>(kernel.config.threads), 1, 1},
                                 static_cast<uint32_t>(kernel.config.shared_bytes),
                                 stream,
                                 nullptr,
                                 0};
  void* arguments[] = {const_cast<void*>(params)};
  const CuResult result = driver().cuLaunchKernelEx(&launch, kernel.handle, arguments, nullptr);
  if (result != kCuSuccess) check(result, ("launch of " + kernel_title(kernel.config)).c_str());
}

std::string kernel_entry(const KernelFamily& family) {
  return std::string("anymask_") + family.name;
}

std::string kernel_source(const KernelConfig& config) {
  const KernelFamily& family = *config.family;
  const std::string params = family.params;
  std::string source = std::string("#include \"") + family.header + "\"\n";
  source += "static_assert(sizeof(" + params + ") == " + std::to_string(family.param_bytes) +
            ", \"host and device disagree about the parameters\");\n";
  std::string call = family.function;
  if (family.config != nullptr) {
    source +=
        std::string("constexpr ") + family.config + " kConfig{" + values_text(config) + "};\n";
    call += "<kConfig>";
  }
  source += "extern \"C\" __global__ void __launch_bounds__(" + std::to_string(config.threads) +
            ", " + std::to_string(config.min_blocks) + ")\n";
  source += kernel_entry(family) + "(const __grid_constant__ " + params + " params) {\n";
  return source + "  " + call + "(params);\n}\n";
}

std::string kernel_title(const KernelConfig& config) {
  return std::string(config.family->name) + "<" + values_text(config) + ">";
}

}  // namespace anymask::cuda
