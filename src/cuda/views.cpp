#include "cuda/views.h"

#include <algorithm>
#include <string>

#include "anymask/error.hpp"
#include "cuda/driver.h"

namespace anymask::cuda {
namespace {

bool is_empty(const Tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] == 0; }

}  // namespace

const char* layout_problem(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) {
    return "its address must be a multiple of 16 bytes";
  }
  if (tensor.shape[3] > 1 && tensor.stride[3] != 1) return "its last dimension must be contiguous";
  for (int i = 0; i < 3; ++i) {
    if (tensor.shape[i] > 1 && (tensor.stride[i] % 8 != 0 || tensor.stride[i] < 0)) {
      return "its strides must be multiples of 16 bytes, and not negative";
    }
  }
  return nullptr;
}

void check_layout(const Tensor& tensor, const char* name) {
  if (is_empty(tensor)) return;
  if (const char* problem = layout_problem(tensor)) {
    throw InvalidValue(std::string(name) + ": " + problem);
  }
}

TensorMapBytes tensor_map(const Tensor& tensor, int rows, int columns) {
  TensorMapBytes bytes{};
  if (is_empty(tensor)) return bytes;
  TensorMapSpec spec{};
  spec.type = tensor.dtype == DType::f16 ? TensorMapType::kFloat16 : TensorMapType::kBfloat16;
  spec.rank = 4;
  spec.address = reinterpret_cast<uint64_t>(tensor.data);
  constexpr int kOrder[4] = {3, 1, 2, 0};  // depth, length, heads, batch
  for (int i = 0; i < 4; ++i) {
    const int dimension = kOrder[i];
    spec.extent[i] = static_cast<uint64_t>(tensor.shape[dimension]);
    // Along a dimension of one element nothing is ever stepped over; any legal stride will do.
    spec.stride_bytes[i] =
        tensor.shape[dimension] == 1 ? 16 : static_cast<uint64_t>(tensor.stride[dimension]) * 2;
    spec.box[i] = 1;
  }
  spec.box[0] = static_cast<uint32_t>(columns);
  spec.box[1] = static_cast<uint32_t>(rows);
  spec.swizzle = columns == 64 ? TensorMapSwizzle::k128Bytes : TensorMapSwizzle::k32Bytes;
  const TensorMap map = encode_tensor_map(spec);
  std::copy(std::begin(map.opaque), std::end(map.opaque), std::begin(bytes.opaque));
  return bytes;
}

Problem problem_of_views(const Tensor& q, const Tensor& k, const Tensor& v) {
  Problem problem;
  problem.batch = q.shape[0];
  problem.q_len = q.shape[1];
  problem.q_heads = q.shape[2];
  problem.head_dim = q.shape[3];
  problem.kv_len = k.shape[1];
  problem.kv_heads = k.shape[2];
  problem.v_head_dim = v.shape[3];
  return problem;
}

}  // namespace anymask::cuda
