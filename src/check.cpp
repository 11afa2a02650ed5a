#include "check.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "mask/describe.h"

namespace anymask {
namespace {

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.ndim != static_cast<int32_t>(shape.size())) return false;
  return std::equal(shape.begin(), shape.end(), tensor.shape);
}

int64_t elements(const Tensor& tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

// Memory that can be read or written element by element.
void check_memory(const char* name, const Tensor& tensor) {
  if (elements(tensor) == 0) return;
  if (tensor.data == nullptr) throw InvalidValue(std::string(name) + " has no memory (null data)");
  if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(size_of(tensor.dtype)) !=
      0) {
    throw InvalidValue(std::string(name) + " is not aligned to its element size of " +
                       std::to_string(size_of(tensor.dtype)) + " bytes");
  }
}

// Rows of the last dimension lie contiguous in memory.
void check_rows(const char* name, const Tensor& tensor) {
  const int last = tensor.ndim - 1;
  if (tensor.shape[last] > 1 && tensor.stride[last] != 1) {
    throw InvalidValue(std::string(name) + " has stride " + std::to_string(tensor.stride[last]) +
                       " in its last dimension; it must be contiguous there (stride 1)");
  }
}

void check_output_overlap(const char* name, const Tensor& tensor) {
  if (elements(tensor) == 0) return;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] > 1 && tensor.stride[i] == 0) {
      throw InvalidValue(std::string(name) + " is an output but dimension " + std::to_string(i) +
                         " is expanded (stride 0), so elements share memory");
    }
  }
}

void check_device(const char* name, const Tensor& tensor, Device device) {
  if (tensor.device != device) {
    throw InvalidType(std::string(name) + " is on " + device_text(tensor.device) + "; q is on " +
                      device_text(device));
  }
}

void check_head_dim(const char* name, int64_t size) {
  if (size < 8 || size > 256 || size % 8 != 0) {
    throw InvalidValue(std::string(name) + " has head_dim " + std::to_string(size) +
                       "; it must be a multiple of 8 from 8 to 256");
  }
}

enum class Role { input, output };

void check_like(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                const char* meaning, DType dtype, Device device, Role role) {
  if (!tensor.given()) throw InvalidValue(std::string(name) + " is missing");
  if (!has_shape(tensor, shape)) fail_shape(name, tensor, meaning + (" = " + shape_text(shape)));
  if (tensor.dtype != dtype) fail_dtype(name, tensor.dtype, name_of(dtype));
  check_device(name, tensor, device);
  check_memory(name, tensor);
  if (role == Role::output) check_output_overlap(name, tensor);
}

void check_out_and_lse(const Tensor& out, const Tensor& lse, const Problem& p, Role role) {
  check_like("out", out, {p.batch, p.q_len, p.q_heads, p.v_head_dim},
             "[batch, q_len, q_heads, v_head_dim]", p.dtype, p.device, role);
  check_rows("out", out);
  check_like("lse", lse, {p.batch, p.q_heads, p.q_len}, "[batch, q_heads, q_len]",
             p.dtype == DType::f64 ? DType::f64 : DType::f32, p.device, role);
  check_rows("lse", lse);
}

}  // namespace

Problem check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto four = [](const char* name, const Tensor& tensor) {
    if (tensor.ndim != 4) fail_shape(name, tensor, "four dimensions [batch, len, heads, head_dim]");
  };
  four("q", q);
  four("k", k);
  four("v", v);
  const bool on_cpu = q.device.type == DeviceType::cpu;
  if (q.dtype != DType::f32 && q.dtype != DType::f16 && q.dtype != DType::bf16 &&
      !(q.dtype == DType::f64 && on_cpu)) {
    fail_dtype("q", q.dtype,
               on_cpu ? "float32, float16, bfloat16 or float64"
                      : "float16 or bfloat16 (float64 and float32: CPU only)");
  }
  const auto agree = [&](const char* name, const Tensor& tensor) {
    if (tensor.dtype != q.dtype) {
      fail_dtype(name, tensor.dtype, std::string("the type of q, ") + name_of(q.dtype));
    }
    check_device(name, tensor, q.device);
  };
  agree("k", k);
  agree("v", v);
  const Problem problem{.batch = q.shape[0],
                        .q_heads = q.shape[2],
                        .kv_heads = k.shape[2],
                        .q_len = q.shape[1],
                        .kv_len = k.shape[1],
                        .head_dim = q.shape[3],
                        .v_head_dim = v.shape[3],
                        .dtype = q.dtype,
                        .device = q.device};
  check_head_dim("q", problem.head_dim);
  check_head_dim("v", problem.v_head_dim);
  if (!has_shape(k, {problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim})) {
    fail_shape("k", k,
               "[batch, kv_len, kv_heads, head_dim] with q's batch and head_dim = [" +
                   std::to_string(problem.batch) + ", kv_len, kv_heads, " +
                   std::to_string(problem.head_dim) + "]");
  }
  if (!has_shape(v, {problem.batch, problem.kv_len, problem.kv_heads, problem.v_head_dim})) {
    fail_shape("v", v,
               "[batch, kv_len, kv_heads, v_head_dim] with k's batch, length and heads = [" +
                   std::to_string(problem.batch) + ", " + std::to_string(problem.kv_len) + ", " +
                   std::to_string(problem.kv_heads) + ", v_head_dim]");
  }
  if (problem.kv_heads < 1 || problem.q_heads < 1 || problem.q_heads % problem.kv_heads != 0) {
    throw InvalidValue("q has " + std::to_string(problem.q_heads) + " heads and k has " +
                       std::to_string(problem.kv_heads) + "; q's heads must be a multiple of k's");
  }
  check_memory("q", q);
  check_memory("k", k);
  check_memory("v", v);
  check_rows("q", q);
  check_rows("k", k);
  check_rows("v", v);
  return problem;
}

void check_forward(const ForwardArgs& args, const Problem& problem) {
  check_out_and_lse(args.out, args.lse, problem, Role::output);
}

void check_backward(const BackwardArgs& args, const Problem& p) {
  check_out_and_lse(args.out, args.lse, p, Role::input);
  check_like("dout", args.dout, {p.batch, p.q_len, p.q_heads, p.v_head_dim}, "the shape of out",
             p.dtype, p.device, Role::input);
  check_rows("dout", args.dout);
  if (args.dlse.given()) {
    check_like("dlse", args.dlse, {p.batch, p.q_heads, p.q_len}, "the shape of lse", args.lse.dtype,
               p.device, Role::input);
    check_rows("dlse", args.dlse);
  }
  const auto gradient = [&](const char* name, const Tensor& tensor, int64_t length, int64_t heads,
                            int64_t head_dim, const char* meaning) {
    check_like(name, tensor, {p.batch, length, heads, head_dim}, meaning, p.dtype, p.device,
               Role::output);
    check_rows(name, tensor);
  };
  gradient("dq", args.dq, p.q_len, p.q_heads, p.head_dim, "the shape of q");
  gradient("dk", args.dk, p.kv_len, p.kv_heads, p.head_dim, "the shape of k");
  gradient("dv", args.dv, p.kv_len, p.kv_heads, p.v_head_dim, "the shape of v");
}

double check_scale(const std::optional<double>& scale, const Problem& problem) {
  if (!scale) return 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  if (!std::isfinite(*scale)) {
    throw InvalidValue("scale is " + std::to_string(*scale) + "; it must be finite");
  }
  return *scale;
}

}  // namespace anymask
