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

bool one_or(int64_t size, int64_t whole) { return size == 1 || size == whole; }

DType sum_type(const Problem& p) { return p.dtype == DType::f64 ? DType::f64 : DType::f32; }

// Type, device and memory of an option that is added to scores.
void check_option(const char* name, const Tensor& tensor, const Problem& p) {
  if (tensor.dtype != p.dtype && tensor.dtype != sum_type(p)) {
    fail_dtype(name, tensor.dtype,
               std::string("the type of q, ") + name_of(p.dtype) +
                   (p.dtype == sum_type(p) ? "" : ", or float32"));
  }
  check_device(name, tensor, p.device);
  check_memory(name, tensor);
}

// The gradient of an option: its shape and type.
void check_option_gradient(const char* name, const Tensor& gradient, const Tensor& option) {
  if (!gradient.given()) return;
  const char* option_name = name + 1;  // without the d
  if (!option.given()) {
    throw InvalidValue(std::string(name) + " is wanted, but there is no " + option_name);
  }
  const bool same = gradient.ndim == option.ndim &&
                    std::equal(option.shape, option.shape + option.ndim, gradient.shape);
  if (!same) {
    fail_shape(name, gradient,
               std::string("the shape of ") + option_name + " = " + shape_text(option));
  }
  if (gradient.dtype != option.dtype) {
    fail_dtype(name, gradient.dtype,
               std::string("the type of ") + option_name + ", " + name_of(option.dtype));
  }
  check_device(name, gradient, option.device);
  check_memory(name, gradient);
  check_output_overlap(name, gradient);
  check_rows(name, gradient);
}

void check_out_and_lse(const Tensor& out, const Tensor& lse, const Problem& p, Role role) {
  check_like("out", out, {p.batch, p.q_len, p.q_heads, p.v_head_dim},
             "[batch, q_len, q_heads, v_head_dim]", p.dtype, p.device, role);
  check_rows("out", out);
  check_like("lse", lse, {p.batch, p.q_heads, p.q_len}, "[batch, q_heads, q_len]", sum_type(p),
             p.device, role);
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
  if (q.dtype != DType::f16 && q.dtype != DType::bf16 &&
      !((q.dtype == DType::f32 || q.dtype == DType::f64) && on_cpu)) {
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

void check_scores(const ScoreOptions& scores, const Problem& p) {
  if (!(scores.softcap >= 0) || !std::isfinite(scores.softcap)) {
    throw InvalidValue("softcap is " + std::to_string(scores.softcap) +
                       "; it must be finite and 0 (none) or more");
  }
  if (!(scores.dropout_p >= 0 && scores.dropout_p < 1)) {
    throw InvalidValue("dropout_p is " + std::to_string(scores.dropout_p) +
                       "; it must be at least 0 and less than 1");
  }
  if (scores.dropout_p > 0) {
    check_like("seed_offset", scores.seed_offset, {2}, "[seed, offset]", DType::i64, p.device,
               Role::input);
    check_rows("seed_offset", scores.seed_offset);
  }
  if (scores.sink.given()) {
    check_option("sink", scores.sink, p);
    if (!has_shape(scores.sink, {p.q_heads})) {
      fail_shape("sink", scores.sink, "[q_heads] = " + shape_text({p.q_heads}));
    }
  }
  if (const Tensor& t = scores.key_bias; t.given()) {
    check_option("key_bias", t, p);
    if (t.ndim != 3 || !one_or(t.shape[0], p.batch) || t.shape[1] < 1 ||
        p.q_heads % t.shape[1] != 0 || t.shape[2] != p.kv_len) {
      fail_shape("key_bias", t,
                 "[batch or 1, heads, kv_len] = [" + std::to_string(p.batch) +
                     " or 1, a divisor of " + std::to_string(p.q_heads) + ", " +
                     std::to_string(p.kv_len) + "]");
    }
  }
  if (const Tensor& t = scores.bias; t.given()) {
    check_option("bias", t, p);
    if (t.ndim != 4 || !one_or(t.shape[0], p.batch) || !one_or(t.shape[1], p.q_heads) ||
        !one_or(t.shape[2], p.q_len) || t.shape[3] != p.kv_len) {
      fail_shape("bias", t,
                 "[batch or 1, q_heads or 1, q_len or 1, kv_len] = [" + std::to_string(p.batch) +
                     " or 1, " + std::to_string(p.q_heads) + " or 1, " + std::to_string(p.q_len) +
                     " or 1, " + std::to_string(p.kv_len) + "]");
    }
    if (t.shape[3] > 1 && t.stride[3] != 0) check_rows("bias", t);
  }
}

void check_forward(const ForwardArgs& args, const Problem& problem) {
  check_scores(args.scores, problem);
  check_out_and_lse(args.out, args.lse, problem, Role::output);
}

void check_score_gradients(const ScoreGradientViews& gradients, const ScoreOptions& scores) {
  check_option_gradient("dkey_bias", gradients.dkey_bias, scores.key_bias);
  check_option_gradient("dbias", gradients.dbias, scores.bias);
  check_option_gradient("dsink", gradients.dsink, scores.sink);
}

void check_backward(const BackwardArgs& args, const Problem& p) {
  check_scores(args.scores, p);
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
  check_score_gradients({args.dkey_bias, args.dbias, args.dsink}, args.scores);
}

double check_scale(const std::optional<double>& scale, const Problem& problem) {
  if (!scale) return 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  if (!std::isfinite(*scale)) {
    throw InvalidValue("scale is " + std::to_string(*scale) + "; it must be finite");
  }
  return *scale;
}

}  // namespace anymask
