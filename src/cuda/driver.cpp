#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "anymask/error.hpp"

namespace anymask::cuda {
namespace {

// cuLibrary*, cuKernel* and tensor maps came with CUDA 12.0, parameters of over 4 KiB with 12.1.
constexpr int kOldestDriver = 12010;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string error_text(const Driver& driver, CuResult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &text);
  return std::string(text != nullptr ? text : "unknown error") + " (" +
         (name != nullptr ? name : std::to_string(result).c_str()) + ")";
}

// Fills `driver`, or says why it cannot.
std::string open_driver(Driver& driver) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return "no NVIDIA driver was found: libcuda.so.1 cannot be opened. Install the NVIDIA driver "
           "(in a container, start it with GPU access), or use CPU tensors";
  }
  std::string missing;
#define ANYMASK_LOAD(name, symbol, parameters)                                     \
  driver.name = reinterpret_cast<CuResult(*) parameters>(dlsym(library, #symbol)); \
  if (driver.name == nullptr) missing = #symbol;
  ANYMASK_DRIVER_FUNCTIONS(ANYMASK_LOAD)
#undef ANYMASK_LOAD
  driver.version = 0;
  if (driver.cuDriverGetVersion != nullptr) driver.cuDriverGetVersion(&driver.version);
  if (!missing.empty() || driver.version < kOldestDriver) {
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(driver.version) +
           ", anymask needs " + version_text(kOldestDriver) + " or newer (driver 530)" +
           (missing.empty() ? "" : "; " + missing + " is missing");
  }
  if (const CuResult result = driver.cuInit(0); result == kCuNoDevice) {
    return "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)";
  } else if (result != kCuSuccess) {
    return "the NVIDIA driver cannot start: " + error_text(driver, result);
  }
  return "";
}

// The opened driver, or nullptr and the reason. A success is final, a failure is tried again.
const Driver* find_driver(std::string* problem) {
  static std::atomic<const Driver*> ready{nullptr};
  static std::mutex mutex;
  static Driver storage;
  if (const Driver* found = ready.load(std::memory_order_acquire)) return found;
  const std::lock_guard lock(mutex);
  if (const Driver* found = ready.load(std::memory_order_acquire)) return found;
  *problem = open_driver(storage);
  if (!problem->empty()) return nullptr;
  ready.store(&storage, std::memory_order_release);
  return &storage;
}

int attribute(CuDeviceAttribute which, CuDevice device) {
  int value = 0;
  check(driver().cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

Gpu read_gpu(int ordinal) {
  Gpu gpu{};
  gpu.ordinal = ordinal;
  check(driver().cuDeviceGet(&gpu.handle, ordinal), "cuDeviceGet");
  char name[256] = "";
  check(driver().cuDeviceGetName(name, sizeof(name), gpu.handle), "cuDeviceGetName");
  gpu.name = name;
  gpu.capability = 10 * attribute(CuDeviceAttribute::kCapabilityMajor, gpu.handle) +
                   attribute(CuDeviceAttribute::kCapabilityMinor, gpu.handle);
  gpu.multiprocessors = attribute(CuDeviceAttribute::kMultiprocessors, gpu.handle);
  gpu.l2_bytes = attribute(CuDeviceAttribute::kL2Bytes, gpu.handle);
  gpu.shared_bytes = attribute(CuDeviceAttribute::kSharedBytesOptin, gpu.handle);
  check(driver().cuDeviceTotalMem(&gpu.memory_bytes, gpu.handle), "cuDeviceTotalMem");
  return gpu;
}

// The primary context of a device: retained once, kept until the process ends.
CuContext primary_context(int ordinal) {
  static std::mutex mutex;
  static std::vector<CuContext> contexts;
  const std::lock_guard lock(mutex);
  const size_t index = static_cast<size_t>(ordinal);
  if (contexts.size() <= index) contexts.resize(index + 1, nullptr);
  if (contexts[index] == nullptr) {
    check(driver().cuDevicePrimaryCtxRetain(&contexts[index], gpu(ordinal).handle),
          "cuDevicePrimaryCtxRetain");
  }
  return contexts[index];
}

}  // namespace

const Driver& driver() {
  std::string problem;
  const Driver* found = find_driver(&problem);
  if (found == nullptr) throw Unsupported("CUDA: " + problem);
  return *found;
}

std::string driver_problem() {
  std::string problem;
  find_driver(&problem);
  return problem;
}

void check(CuResult result, const char* what) {
  if (result == kCuSuccess) return;
  throw RuntimeFailure(std::string("CUDA: ") + what + ": " + error_text(driver(), result));
}

void clear(void* memory, int64_t bytes, CuStream stream) {
  if (bytes == 0) return;
  check(driver().cuMemsetD32Async(reinterpret_cast<CuAddress>(memory), 0,
                                  static_cast<size_t>(bytes / 4), stream),
        "cuMemsetD32Async");
}

int gpu_count() {
  if (!driver_problem().empty()) return 0;
  int count = 0;
  check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

const Gpu& gpu(int ordinal) {
  static const std::vector<Gpu> all = [] {
    int count = 0;
    check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    std::vector<Gpu> gpus;
    for (int i = 0; i < count; ++i) gpus.push_back(read_gpu(i));
    return gpus;
  }();
  if (ordinal < 0 || ordinal >= static_cast<int>(all.size())) {
    throw InvalidValue("device: got cuda:" + std::to_string(ordinal) + ", this process sees " +
                       std::to_string(all.size()) + " GPU(s)");
  }
  return all[static_cast<size_t>(ordinal)];
}

DeviceScope::DeviceScope(int ordinal) {
  const Driver& cuda = driver();
  check(cuda.cuCtxGetCurrent(&previous_), "cuCtxGetCurrent");
  if (previous_ != nullptr) {
    CuDevice current = 0;
    check(cuda.cuCtxGetDevice(&current), "cuCtxGetDevice");
    if (current == gpu(ordinal).handle) return;
  }
  check(cuda.cuCtxSetCurrent(primary_context(ordinal)), "cuCtxSetCurrent");
  changed_ = true;
}

DeviceScope::~DeviceScope() {
  if (changed_) driver().cuCtxSetCurrent(previous_);
}

CaptureGuard::CaptureGuard() {
  constexpr int kRelaxed = 2;
  mode_ = kRelaxed;
  check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

CaptureGuard::~CaptureGuard() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

TensorMap encode_tensor_map(const TensorMapSpec& spec) {
  constexpr uint32_t kStep[5] = {1, 1, 1, 1, 1};
  TensorMap map{};
  check(driver().cuTensorMapEncodeTiled(
            &map, spec.type, spec.rank, reinterpret_cast<void*>(spec.address), spec.extent,
            spec.stride_bytes + 1, spec.box, kStep, /*interleave=*/0, spec.swizzle, spec.promotion,
            /*fill=*/0),
        "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace anymask::cuda
