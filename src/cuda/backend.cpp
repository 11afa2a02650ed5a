#include "cuda/backend.h"

#include <string>

#include "anymask/cuda.hpp"
#include "anymask/error.hpp"
#include "cuda/backward.h"
#include "cuda/cache.h"
#include "cuda/compiler.h"
#include "cuda/forward.h"
#include "cuda/gather_keys.h"
#include "cuda/plan.h"
#include "cuda/report.h"

namespace anymask::cuda {
namespace {

int64_t line_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t bytes_of(const Tensor& t) {
  return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] * size_of(t.dtype);
}

// Hands out 256-byte aligned pieces of the caller's workspace.
class Workspace {
 public:
  Workspace(void* memory, int64_t bytes) : at_(static_cast<char*>(memory)), left_(bytes) {}

  void* take(int64_t bytes) {
    if (line_up(bytes) > left_ || reinterpret_cast<uintptr_t>(at_) % 256 != 0) {
      throw InvalidValue(
          "workspace is too small or not aligned to 256 bytes: ask the workspace_bytes functions");
    }
    char* piece = at_;
    at_ += line_up(bytes);
    left_ -= line_up(bytes);
    return piece;
  }

 private:
  char* at_;
  int64_t left_;
};

// A contiguous tensor of the same shape in the workspace.
Tensor ordered_like(const Tensor& t, Workspace& workspace) {
  return Tensor(workspace.take(bytes_of(t)), t.dtype,
                {t.shape[0], t.shape[1], t.shape[2], t.shape[3]}, t.device);
}

Tensor gathered(const Tensor& t, const plan::Plan& plan, Workspace& workspace, CuStream stream) {
  if (plan.program.key_order == nullptr) return t;
  const Tensor ordered = ordered_like(t, workspace);
  gather_keys(t, ordered, plan, stream);
  return ordered;
}

int64_t gathered_bytes(const rules::Program& lowered, const Problem& p) {
  if (lowered.reorder_keys == 0) return 0;
  const int64_t rows = p.batch * p.kv_len * p.kv_heads * size_of(p.dtype);
  return line_up(rows * p.head_dim) + line_up(rows * p.v_head_dim);
}

}  // namespace

plan::TileShapes tile_shapes(const Problem& problem) {
  return {.forward = forward_tile_shape(problem),
          .backward = backward_tile_shape(problem.head_dim, problem.v_head_dim),
          .bake = 1};
}

int64_t plan_scratch(const rules::Program& lowered) { return plan_scratch_bytes(lowered); }

void build_plan(const rules::Program& lowered, const plan::Plan& plan, void* scratch,
                const Problem& problem, void* stream) {
  build_plan(lowered, plan, scratch, problem.device.index, static_cast<CuStream>(stream));
}

int64_t forward_workspace(const rules::Program& lowered, const Problem& problem) {
  return line_up(forward_workspace_bytes(problem, lowered)) + gathered_bytes(lowered, problem);
}

int64_t backward_workspace(const rules::Program& lowered, const Problem& problem,
                           bool deterministic, const ScoreOptions& scores,
                           const ScoreGradientViews& gradients) {
  const ScoreCall call{scores, gradients.dkey_bias, gradients.dbias, gradients.dsink};
  return line_up(backward_workspace(problem, deterministic, call)) +
         gathered_bytes(lowered, problem);
}

void forward(const ForwardArgs& args, const Problem& problem, const plan::Plan& plan,
             double scale) {
  const auto stream = static_cast<CuStream>(args.stream);
  const int ordinal = problem.device.index;
  const DeviceScope scope(ordinal);
  Workspace workspace(args.workspace, args.workspace_bytes);
  ForwardCall call{};
  call.workspace = workspace.take(forward_workspace_bytes(problem, plan.program));
  call.q = args.q;
  call.k = gathered(args.k, plan, workspace, stream);
  call.v = gathered(args.v, plan, workspace, stream);
  call.out = args.out;
  call.lse = args.lse;
  call.program = &plan.program;
  call.rows = plan.forward_rows;
  call.scale = scale;
  call.scores = &args.scores;
  forward(call, ordinal, stream);
}

void backward(const BackwardArgs& args, const Problem& problem, const plan::Plan& plan,
              double scale) {
  const auto stream = static_cast<CuStream>(args.stream);
  const int ordinal = problem.device.index;
  const DeviceScope scope(ordinal);
  Workspace workspace(args.workspace, args.workspace_bytes);
  BackwardCall call{};
  call.workspace = workspace.take(backward_workspace(
      problem, args.deterministic, {args.scores, args.dkey_bias, args.dbias, args.dsink}));
  call.q = args.q;
  call.k = gathered(args.k, plan, workspace, stream);
  call.v = gathered(args.v, plan, workspace, stream);
  call.out = args.out;
  call.lse = args.lse;
  call.dout = args.dout;
  call.dlse = args.dlse;
  call.dq = args.dq;
  call.dk = args.dk;
  call.dv = args.dv;
  call.program = &plan.program;
  call.rows = plan.backward_rows;
  call.columns = plan.backward_columns;
  call.scale = scale;
  call.scores = &args.scores;
  call.dkey_bias = args.dkey_bias;
  call.dbias = args.dbias;
  call.dsink = args.dsink;
  call.deterministic = args.deterministic;
  backward(call, ordinal, stream);
}

}  // namespace anymask::cuda

namespace anymask {

std::string cuda_report() { return cuda::report_json(); }
int warm_up_cuda(int capability) { return cuda::warm_up(capability); }
void add_cuda_library_folder(const std::string& folder) { cuda::add_library_folder(folder); }
void set_cuda_package_cache(const std::string& folder) { cuda::set_package_cache(folder); }

}  // namespace anymask
