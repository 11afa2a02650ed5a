// attention: softmax(scale * q k^T, where the mask allows) v, and its gradients.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "anymask/plan.hpp"

namespace anymask {

// What happens to the scores between q k^T and the product with v; "none" and 0 change nothing. In
// this order, for query head h, row i and key j:
//
//   x     = scale * q.k, then softcap * tanh(x / softcap) where softcap > 0
//   logit = x + bias[b, h, i, j] + key_bias[b, h, j]
//   P     = softmax over the keys that the mask allows and one more logit, sink[h], without a value
//   out   = sum of P * (0 where the pair is dropped, else 1 / (1 - dropout_p)) * v
//
// lse counts the sink, and what is dropped. -inf in a bias hides a pair. Types: q's, or f32 (f64
// where q is). Any strides; a stride of 0 broadcasts, as does a size of 1 where "or 1" says so.
struct ScoreOptions {
  Tensor key_bias;     // [B or 1, H, Sk], H a divisor of Hq
  Tensor bias;         // [B or 1, Hq or 1, Sq or 1, Sk]; stride 1 or 0 in the last dimension
  Tensor sink;         // [Hq], finite or -inf
  Tensor seed_offset;  // i64 [2] on q's device, contiguous; needed where dropout_p > 0
  double softcap = 0;
  // Rounded to a multiple of 1 / 256 (near 0 and 1: of 1 / 65536). Which pairs are dropped is a
  // function of seed, offset, batch entry, query head, row and key alone (src/rules/philox.h).
  double dropout_p = 0;
};

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
  ScoreOptions scores;
  void* stream = nullptr;     // CUstream of a CUDA call
  void* workspace = nullptr;  // CUDA: forward_workspace_bytes of scratch memory
  int64_t workspace_bytes = 0;
};

// Gradients of score options: outputs, of the options' shapes and types; "none" where not wanted.
struct ScoreGradientViews {
  Tensor dkey_bias, dbias, dsink;
};

struct BackwardArgs {
  Tensor q, k, v, out, lse;  // as they went into and came out of the forward pass
  Tensor dout;               // gradient of out, same shape and type
  Tensor dlse;               // optional gradient of lse, same shape and type
  Tensor dq, dk, dv;         // outputs, shapes and types of q, k, v
  // Outputs, shapes and types of the options; "none" where not wanted.
  Tensor dkey_bias, dbias, dsink;
  Mask mask;
  const void* plan = nullptr;
  int64_t plan_bytes = 0;
  std::optional<double> scale;
  ScoreOptions scores;         // as in the forward pass
  bool deterministic = false;  // CPU: always
  void* stream = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// A query that may see nothing, or only logits of -inf, gets out = 0, lse = -inf (with a sink: the
// sink) and zero gradients.
void attention_forward(const ForwardArgs& args);
void attention_backward(const BackwardArgs& args);

// Scratch memory that a CUDA call needs beside its plan; 0 on the CPU.
int64_t forward_workspace_bytes(const Mask& mask, const Problem& problem);
// The backward pass's depends on the score options and their gradients, of which only types and
// shapes are looked at.
int64_t backward_workspace_bytes(const Mask& mask, const Problem& problem, bool deterministic,
                                 const ScoreOptions& scores = {},
                                 const ScoreGradientViews& gradients = {});

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
