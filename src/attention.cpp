// The verb: checks a call, finds its plan and hands it to a backend.
#include "anymask/attention.hpp"

#include <algorithm>
#include <new>
#include <string>

#include "anymask/error.hpp"
#include "check.h"
#include "cpu/backend.h"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "cuda/backend.h"
#include "mask/lower.h"
#include "plan/view.h"

namespace anymask {
namespace {

bool on_cuda(const Problem& problem) { return problem.device.type == DeviceType::cuda; }

// A mask lowered for a problem, and how its plan lies in a buffer.
struct Lowered {
  rules::Program program;
  plan::TileShapes shapes;
  int64_t plan_bytes;     // of the plan's own sections
  int64_t scratch_bytes;  // behind them, for building it
  bool gpu;

  Lowered(const Mask& mask, const Problem& problem)
      : program(lower(mask, problem)),
        shapes(on_cuda(problem) ? cuda::tile_shapes(problem) : cpu::tile_shapes(problem)),
        plan_bytes(plan::bytes_needed(program, shapes)),
        scratch_bytes(on_cuda(problem) ? cuda::plan_scratch(program) : 0),
        gpu(on_cuda(problem)) {}

  // On a GPU what remains of 16 KiB says for which forward tile a plan is: so none is taken for
  // that of a call of another batch or number of heads, which may have another tile.
  int64_t bytes() const {
    constexpr int64_t kLine = 1 << 14;
    const int64_t all = plan_bytes + scratch_bytes;
    if (!gpu || all == 0) return all;
    const int64_t tile = 256 * (shapes.forward.rows / 64) + 1024 * (shapes.forward.columns / 16);
    return (all + kLine - 1) / kLine * kLine + tile;
  }
};

// The plan in the caller's buffer, or (CPU) one made for this call.
class CallPlan {
 public:
  CallPlan(const Mask& mask, const Problem& problem, const void* buffer, int64_t bytes,
           Passes passes) {
    const Lowered lowered(mask, problem);
    if (buffer == nullptr && on_cuda(problem) && lowered.bytes() > 0) {
      throw InvalidValue("plan is missing: a CUDA call needs one");
    }
    if (buffer == nullptr && !on_cuda(problem)) {
      own_.emplace(mask, problem, passes);
      buffer = own_->buffer();
      bytes = own_->bytes();
    }
    if (bytes != lowered.bytes()) {
      throw InvalidValue("plan has " + std::to_string(bytes) + " bytes; this mask and call need " +
                         std::to_string(lowered.bytes()) +
                         ": it was made for another mask or shape");
    }
    plan_ = plan::view(lowered.program, lowered.shapes, const_cast<void*>(buffer));
  }

  const plan::Plan& get() const { return plan_; }

 private:
  std::optional<Plan> own_;
  plan::Plan plan_;
};

}  // namespace

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  return check_inputs(q, k, v);
}

int64_t plan_bytes(const Mask& mask, const Problem& problem) {
  return Lowered(mask, problem).bytes();
}

void build_plan(const Mask& mask, const Problem& problem, void* buffer, int64_t bytes, void* stream,
                Passes passes) {
  const Lowered lowered(mask, problem);
  if (bytes < lowered.bytes()) {
    throw InvalidValue("buffer has " + std::to_string(bytes) + " bytes; this plan needs " +
                       std::to_string(lowered.bytes()));
  }
  if (reinterpret_cast<uintptr_t>(buffer) % 256 != 0) {
    throw InvalidValue("buffer must be aligned to 256 bytes");
  }
  plan::Plan plan = plan::view(lowered.program, lowered.shapes, buffer);
  if (passes == Passes::forward) plan = plan::forward_only(plan);
  if (on_cuda(problem)) {
    cuda::build_plan(lowered.program, plan, static_cast<char*>(buffer) + lowered.plan_bytes,
                     problem, stream);
  } else {
    cpu::build_plan(lowered.program, plan);
  }
}

Plan::Plan(Mask mask, const Problem& problem, Passes passes)
    : mask_(std::move(mask)), problem_(problem), bytes_(plan_bytes(mask_, problem)) {
  buffer_.reset(::operator new (static_cast<size_t>(bytes_), std::align_val_t{256}));
  build_plan(mask_, problem_, buffer_.get(), bytes_, nullptr, passes);
}

void Plan::Free::operator()(void* buffer) const {
  ::operator delete (buffer, std::align_val_t{256});
}

int64_t forward_workspace_bytes(const Mask& mask, const Problem& problem) {
  return on_cuda(problem) ? cuda::forward_workspace(lower(mask, problem), problem) : 0;
}

int64_t backward_workspace_bytes(const Mask& mask, const Problem& problem, bool deterministic,
                                 const ScoreOptions& scores, const ScoreGradientViews& gradients) {
  const rules::Program lowered = lower(mask, problem);
  if (!on_cuda(problem)) return 0;
  check_scores(scores, problem);
  check_score_gradients(gradients, scores);
  return cuda::backward_workspace(lowered, problem, deterministic, scores, gradients);
}

void attention_forward(const ForwardArgs& args) {
  const Problem problem = check_inputs(args.q, args.k, args.v);
  check_forward(args, problem);
  const double scale = check_scale(args.scale, problem);
  const CallPlan plan(args.mask, problem, args.plan, args.plan_bytes, Passes::forward);
  if (on_cuda(problem)) return cuda::forward(args, problem, plan.get(), scale);
  cpu::forward({.q = args.q,
                .k = args.k,
                .v = args.v,
                .out = args.out,
                .lse = args.lse,
                .program = &plan.get().program,
                .rows = plan.get().forward_rows,
                .scale = scale,
                .scores = args.scores});
}

void attention_backward(const BackwardArgs& args) {
  const Problem problem = check_inputs(args.q, args.k, args.v);
  check_backward(args, problem);
  const double scale = check_scale(args.scale, problem);
  const CallPlan plan(args.mask, problem, args.plan, args.plan_bytes, Passes::both);
  if (on_cuda(problem)) return cuda::backward(args, problem, plan.get(), scale);
  cpu::backward({.q = args.q,
                 .k = args.k,
                 .v = args.v,
                 .out = args.out,
                 .lse = args.lse,
                 .dout = args.dout,
                 .dlse = args.dlse,
                 .dq = args.dq,
                 .dk = args.dk,
                 .dv = args.dv,
                 .program = &plan.get().program,
                 .rows = plan.get().backward_rows,
                 .columns = plan.get().backward_columns,
                 .scale = scale,
                 .scores = args.scores,
                 .dkey_bias = args.dkey_bias,
                 .dbias = args.dbias,
                 .dsink = args.dsink});
}

std::vector<std::string> cpu_instruction_sets() { return cpu::instruction_sets(); }
std::string cpu_instruction_set() { return cpu::instruction_set(); }
void set_cpu_instruction_set(const std::string& name) { cpu::set_instruction_set(name); }
int cpu_threads() { return cpu::threads(); }
double measure_cpu_peak(DType dtype) { return cpu::measure_peak(dtype); }

void set_cpu_threads(int threads) {
  if (threads < 0) {
    throw InvalidValue("threads is " + std::to_string(threads) + "; it must be 0 or more");
  }
  cpu::set_threads(threads);
}

}  // namespace anymask
