// The plan's kernels, run on the CPU thread by thread. Needs no GPU.
#include "cuda/emulator.h"
//
#include "cuda/baked_cases.h"
#include "cuda/device/bake.h"
#include "cuda/device/key_order.h"
#include "cuda/device/pack.h"
#include "cuda/device/plan.h"
#include "cuda/plan.h"
#include "cuda/plan_cases.h"

namespace anymask::cuda {
namespace {

std::function<void()> body_of(const PlanStep& step) {
  if (const auto* classified = std::get_if<ClassifyParams>(&step.params)) {
    // Real launches look at whole blocks only when there are many; here every other one does.
    static int launches = 0;
    ClassifyParams params = *classified;
    for (ClassifyPass& pass : params.passes) {
      pass.look_at_block = launches % 2 == 0 ? pass.look_at_spans : 0;
    }
    ++launches;
    return [params] { classify(params); };
  }
  if (const auto* packed = std::get_if<PackParams>(&step.params)) {
    const bool quads = step.config.values[1] != 0;
    switch (step.config.values[0]) {
      case 1:
        if (quads) return [packed] { pack<PackConfig{1, true}>(*packed); };
        return [packed] { pack<PackConfig{1, false}>(*packed); };
      case 2:
        return [packed] { pack<PackConfig{2, false}>(*packed); };
      case 4:
        return [packed] { pack<PackConfig{4, false}>(*packed); };
      default:
        return [packed] { pack<PackConfig{8, false}>(*packed); };
    }
  }
  if (const auto* baked = std::get_if<BakeParams>(&step.params)) {
    return [baked] { bake(*baked); };
  }
  const std::string name = step.config.family->name;
  if (const auto* keys = std::get_if<KeyOrderParams>(&step.params)) {
    if (name == "plan_see_keys") return [keys] { see_keys(*keys); };
    if (name == "plan_sort_keys") return [keys] { sort_keys(*keys); };
    return [keys] { group_keys(*keys); };
  }
  const auto* order = std::get_if<OrderParams>(&step.params);
  if (name == "plan_count") return [order] { count_tiles(*order); };
  return [order] { order_tiles(*order); };
}

BuiltPlan build_emulated(Masks& masks, const plan::TileShapes& shapes) {
  static std::vector<char> buffer;
  const Program& program = masks.program;
  buffer.assign(static_cast<size_t>(plan::bytes_needed(program, shapes)), char(0xa5));
  const plan::Plan plan = plan::view(program, shapes, buffer.data());
  std::vector<char> scratch(static_cast<size_t>(plan_scratch_bytes(program)), char(0xa5));
  for (const PlanStep& step : plan_steps(program, plan, scratch.data())) {
    emulate(step.grid.x, step.config.threads, body_of(step));
  }
  return BuiltPlan{buffer, plan, buffer.data()};
}

TEST(PlanEmulated, MatchesPlanOnCpu) { check_plans(/*quickly=*/true, build_emulated); }

TEST(PlanEmulated, BakesTheBitsOfMasksWithDenseLeaves) { check_baked_plans(build_emulated); }

}  // namespace
}  // namespace anymask::cuda
