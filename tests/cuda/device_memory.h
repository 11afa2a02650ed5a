// Device memory for tests that need a GPU, through the library's own driver table.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda/driver.h"

namespace anymask::cuda {

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
    check(driver().cuMemAlloc(&address_, bytes > 0 ? bytes : 1), "cuMemAlloc");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : address_(other.address_), bytes_(other.bytes_) {
    other.address_ = 0;
  }
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  ~DeviceMemory() {
    if (address_ != 0) driver().cuMemFree(address_);
  }

  void* data() const { return reinterpret_cast<void*>(address_); }
  size_t bytes() const { return bytes_; }

  void put(const void* from) const {
    check(driver().cuMemcpyHtoDAsync(address_, from, bytes_, nullptr), "cuMemcpyHtoDAsync");
    check(driver().cuStreamSynchronize(nullptr), "cuStreamSynchronize");
  }
  // Every word of it, to see what a kernel leaves unwritten.
  void poison() const {
    check(driver().cuMemsetD32Async(address_, 0xdeadbeefu, bytes_ / 4, nullptr),
          "cuMemsetD32Async");
  }
  std::vector<char> get() const {
    std::vector<char> all(bytes_);
    check(driver().cuMemcpyDtoHAsync(all.data(), address_, bytes_, nullptr), "cuMemcpyDtoHAsync");
    check(driver().cuStreamSynchronize(nullptr), "cuStreamSynchronize");
    return all;
  }

 private:
  CuAddress address_ = 0;
  size_t bytes_;
};

// Keeps device copies of host arrays.
class DeviceCopies {
 public:
  const void* add(const std::vector<char>& bytes) {
    const DeviceMemory& copy = all_.emplace_back(bytes.size());
    copy.put(bytes.data());
    return copy.data();
  }

 private:
  std::vector<DeviceMemory> all_;
};

// What `body(stream)` queues, captured; through driver functions that the library has no use for.
class CapturedGraph {
 public:
  template <typename Body>
  explicit CapturedGraph(Body body) {
    check(function<CuResult(CuStream*, uint32_t)>("cuStreamCreate")(&stream_, 1), "cuStreamCreate");
    check(function<CuResult(CuStream, int)>("cuStreamBeginCapture_v2")(stream_, 0),
          "cuStreamBeginCapture");
    body(stream_);
    void* graph = nullptr;
    check(function<CuResult(CuStream, void**)>("cuStreamEndCapture")(stream_, &graph),
          "cuStreamEndCapture");
    check(function<CuResult(void**, void*, uint64_t)>("cuGraphInstantiateWithFlags")(&executable_,
                                                                                     graph, 0),
          "cuGraphInstantiate");
  }

  // After all work of the default stream; returns when done.
  void replay() const {
    check(driver().cuStreamSynchronize(nullptr), "cuStreamSynchronize");
    check(function<CuResult(void*, CuStream)>("cuGraphLaunch")(executable_, stream_),
          "cuGraphLaunch");
    check(driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
  }

 private:
  template <typename Function>
  static Function* function(const char* name) {
    return reinterpret_cast<Function*>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), name));
  }

  CuStream stream_ = nullptr;
  void* executable_ = nullptr;
};

#define ANYMASK_NEEDS_GPU()                                          \
  if (::anymask::cuda::gpu_count() == 0) {                           \
    GTEST_SKIP() << "no GPU: " << ::anymask::cuda::driver_problem(); \
  }                                                                  \
  const ::anymask::cuda::DeviceScope gpu_scope(0)

}  // namespace anymask::cuda
