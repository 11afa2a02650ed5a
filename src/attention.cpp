// The verb: checks a call, finds its plan and hands it to a backend.
#include "anymask/attention.hpp"

#include <algorithm>
#include <new>
#include <string>

#include "check.h"
#include "cpu/backend.h"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "mask/describe.h"
#include "mask/lower.h"
#include "plan/view.h"

namespace anymask {
namespace {

[[noreturn]] void fail_no_cuda() {
  throw Unsupported("this build of anymask has no CUDA backend; move the tensors to the CPU");
}

plan::TileShapes tile_shapes(const Problem& problem) {
  if (problem.device.type != DeviceType::cpu) fail_no_cuda();
  return cpu::tile_shapes(problem);
}

// The plan in the caller's buffer, or one made for this call.
class CallPlan {
 public:
  CallPlan(const Mask& mask, const Problem& problem, const void* buffer, int64_t bytes) {
    if (buffer == nullptr) {
      own_.emplace(mask, problem);
      buffer = own_->buffer();
      bytes = own_->bytes();
    }
    const rules::Program lowered = lower(mask, problem);
    const plan::TileShapes shapes = tile_shapes(problem);
    const int64_t needed = plan::bytes_needed(lowered, shapes);
    if (bytes != needed) {
      throw InvalidValue("plan has " + std::to_string(bytes) + " bytes; this mask and call need " +
                         std::to_string(needed) + ": it was made for another mask or shape");
    }
    plan_ = plan::view(lowered, shapes, const_cast<void*>(buffer));
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
  return plan::bytes_needed(lower(mask, problem), tile_shapes(problem));
}

void build_plan(const Mask& mask, const Problem& problem, void* buffer, int64_t bytes,
                void* /*stream*/) {
  const rules::Program lowered = lower(mask, problem);
  const plan::TileShapes shapes = tile_shapes(problem);
  const int64_t needed = plan::bytes_needed(lowered, shapes);
  if (bytes < needed) {
    throw InvalidValue("buffer has " + std::to_string(bytes) + " bytes; this plan needs " +
                       std::to_string(needed));
  }
  if (reinterpret_cast<uintptr_t>(buffer) % 256 != 0) {
    throw InvalidValue("buffer must be aligned to 256 bytes");
  }
  cpu::build_plan(lowered, plan::view(lowered, shapes, buffer));
}

Plan::Plan(Mask mask, const Problem& problem)
    : mask_(std::move(mask)), problem_(problem), bytes_(plan_bytes(mask_, problem)) {
  buffer_.reset(::operator new (static_cast<size_t>(bytes_), std::align_val_t{256}));
  build_plan(mask_, problem_, buffer_.get(), bytes_);
}

void Plan::Free::operator()(void* buffer) const {
  ::operator delete (buffer, std::align_val_t{256});
}

int64_t forward_workspace_bytes(const Problem& problem) {
  if (problem.device.type != DeviceType::cpu) fail_no_cuda();
  return 0;
}

int64_t backward_workspace_bytes(const Problem& problem, bool /*deterministic*/) {
  return forward_workspace_bytes(problem);
}

void attention_forward(const ForwardArgs& args) {
  const Problem problem = check_inputs(args.q, args.k, args.v);
  check_forward(args, problem);
  const double scale = check_scale(args.scale, problem);
  const CallPlan plan(args.mask, problem, args.plan, args.plan_bytes);
  cpu::forward({.q = args.q,
                .k = args.k,
                .v = args.v,
                .out = args.out,
                .lse = args.lse,
                .program = &plan.get().program,
                .rows = plan.get().forward_rows,
                .scale = scale});
}

void attention_backward(const BackwardArgs& args) {
  const Problem problem = check_inputs(args.q, args.k, args.v);
  check_backward(args, problem);
  const double scale = check_scale(args.scale, problem);
  const CallPlan plan(args.mask, problem, args.plan, args.plan_bytes);
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
                 .scale = scale});
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
