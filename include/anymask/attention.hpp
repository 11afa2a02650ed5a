// attention: softmax(scale * q k^T, where the mask allows) v, and its gradients.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "anymask/plan.hpp"

namespace anymask {

struct ForwardArgs {
  // Inputs: q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; f32, f16, bf16 (CPU: also f64),
  // any strides with a contiguous last dimension. Hq must be a multiple of Hk.
  Tensor q, k, v;
  // Outputs: out [B, Sq, Hq, Dv] of q's type; lse [B, Hq, Sq] f32 (f64 when q is), natural log.
  Tensor out, lse;
  Mask mask;
  // A plan's buffer for this mask and problem; nullptr: the call makes one (CPU only).
  const void* plan = nullptr;
  int64_t plan_bytes = 0;
  std::optional<double> scale;  // default 1 / sqrt(D)
  void* stream = nullptr;       // CUstream of a CUDA call
  void* workspace = nullptr;    // CUDA: forward_workspace_bytes of scratch memory
  int64_t workspace_bytes = 0;
};

struct BackwardArgs {
  Tensor q, k, v, out, lse;  // as they went into and came out of the forward pass
  Tensor dout;               // gradient of out, same shape and type
  Tensor dlse;               // optional gradient of lse, same shape and type
  Tensor dq, dk, dv;         // outputs, shapes and types of q, k, v
  Mask mask;
  const void* plan = nullptr;
  int64_t plan_bytes = 0;
  std::optional<double> scale;
  bool deterministic = false;  // CPU: always
  void* stream = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// A query that may see nothing gets out = 0, lse = -inf and zero gradients.
void attention_forward(const ForwardArgs& args);
void attention_backward(const BackwardArgs& args);

// Scratch memory that a CUDA call needs beside its plan; 0 on the CPU.
int64_t forward_workspace_bytes(const Mask& mask, const Problem& problem);
int64_t backward_workspace_bytes(const Mask& mask, const Problem& problem, bool deterministic);

// The problem that a call's tensors state.
Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v);

// CPU backend: the instruction sets this machine can run ("baseline", "avx2", "avx512",
// "avx512bf16"), the one in use, and the number of threads (0: one a core).
std::vector<std::string> cpu_instruction_sets();
std::string cpu_instruction_set();
void set_cpu_instruction_set(const std::string& name);
void set_cpu_threads(int threads);
int cpu_threads();
// GFLOP/s that this machine's arithmetic reaches with data in registers, all threads: the ceiling
// that benchmarks compare with. f32, bf16 or f64.
double measure_cpu_peak(DType dtype);

}  // namespace anymask
