// Data types, devices, tensor views and the problem that a mask is planned for.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace anymask {

enum class DType : int32_t { f32, f16, bf16, f64, i32, i64, u8, i8, i16 };

enum class DeviceType : int32_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

// Bytes of one element.
constexpr int size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
      return 2;
    default:
      return 1;
  }
}

const char* name_of(DType dtype);

// A view of memory that the caller owns: up to four dimensions, strides in elements. A default
// Tensor (data == nullptr, ndim == 0) stands for "none".
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = {};
  int32_t ndim = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  Tensor() = default;
  // A contiguous view. Example: Tensor q(pointer, DType::f32, {batch, length, heads, head_dim});
  Tensor(void* memory, DType type, std::initializer_list<int64_t> sizes, Device where = {});

  bool given() const { return ndim != 0; }
};

// What attention is computed for. Shapes: q [batch, q_len, q_heads, head_dim],
// k [batch, kv_len, kv_heads, head_dim], v [batch, kv_len, kv_heads, v_head_dim].
struct Problem {
  int64_t batch = 1;
  int64_t q_heads = 1;
  int64_t kv_heads = 1;
  int64_t q_len = 0;
  int64_t kv_len = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  DType dtype = DType::f32;
  Device device = {};
  friend bool operator==(const Problem&, const Problem&) = default;
};

}  // namespace anymask
