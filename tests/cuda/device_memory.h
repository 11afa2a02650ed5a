// Device memory for tests that need a GPU, through the library's own driver table.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda/driver.h"
#include "rules/program.h"

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
    check(driver().cuMemsetD32Async(address_, 0xdeadbeefu, bytes_ / 4, nullptr), "cuMemsetD32Async");
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

// Host arrays that a program's leaves point to, and their copies on the device.
class Arrays {
 public:
  template <typename T>
  const T* add(std::vector<T> values) {
    std::vector<char>& bytes = host_.emplace_back(
        reinterpret_cast<const char*>(values.data()),
        reinterpret_cast<const char*>(values.data() + values.size()));
    return reinterpret_cast<const T*>(bytes.data());
  }

  rules::Program to_device(rules::Program program) {
    for (int i = 0; i < program.count; ++i) {
      move(program.nodes[i].rows);
      move(program.nodes[i].columns);
    }
    return program;
  }

 private:
  void move(rules::Array& array) {
    for (const std::vector<char>& bytes : host_) {
      if (bytes.data() != array.data) continue;
      device_.emplace_back(bytes.size()).put(bytes.data());
      array.data = device_.back().data();
      return;
    }
  }

  std::vector<std::vector<char>> host_;
  std::vector<DeviceMemory> device_;
};

#define ANYMASK_NEEDS_GPU()                                                   \
  if (::anymask::cuda::gpu_count() == 0) {                                    \
    GTEST_SKIP() << "no GPU: " << ::anymask::cuda::driver_problem();          \
  }                                                                           \
  const ::anymask::cuda::DeviceScope gpu_scope(0)

}  // namespace anymask::cuda
