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
    if (name == "plan_collect_keys") return [keys] { collect_keys(*keys); };
    return [keys] { halve_groups(*keys); };
  }
  const auto* order = std::get_if<OrderParams>(&step.params);
  if (name == "plan_count") return [order] { count_tiles(*order); };
  return [order] { order_tiles(*order); };
}

void build(const Program& program, const plan::Plan& plan) {
  std::vector<char> scratch(static_cast<size_t>(plan_scratch_bytes(program)), char(0xa5));
  for (const PlanStep& step : plan_steps(program, plan, scratch.data())) {
    emulate(step.grid.x, step.config.threads, body_of(step));
  }
}

std::vector<char> poisoned_buffer(const Program& program, const plan::TileShapes& shapes) {
  return std::vector<char>(static_cast<size_t>(plan::bytes_needed(program, shapes)), char(0xa5));
}

// The plan's address stays good until the next one is built.
BuiltPlan build_emulated(Masks& masks, const plan::TileShapes& shapes) {
  static std::vector<char> buffer;
  buffer = poisoned_buffer(masks.program, shapes);
  const plan::Plan plan = plan::view(masks.program, shapes, buffer.data());
  build(masks.program, plan);
  return BuiltPlan{buffer, plan, buffer.data()};
}

TEST(PlanEmulated, MatchesPlanOnCpu) { check_plans(/*quickly=*/true, build_emulated); }

TEST(PlanEmulated, BakesTheBitsOfMasksWithDenseLeaves) { check_baked_plans(build_emulated); }

TEST(PlanEmulated, ForTheForwardPassAlone) {
  const plan::TileShapes shapes = {{192, 128}, {64, 128}};
  Masks masks(5, 2, 1, 700, 900);
  masks.intervals(IntervalForm::kFrom, true);
  std::vector<char> buffer = poisoned_buffer(masks.program, shapes);
  const plan::Plan plan = plan::view(masks.program, shapes, buffer.data());
  build(masks.program, plan::forward_only(plan));
  compare_maps("forward rows", plan.forward_rows, masks.places(),
               cpu_plan(masks.program, shapes).data(), buffer.data(), buffer.data());
  EXPECT_EQ(*plan.backward_rows.visible, 0xa5a5a5a5u);
  EXPECT_EQ(*plan.backward_columns.visible, 0xa5a5a5a5u);
}

TEST(PlanEmulated, BakesForTheForwardPassAlone) {
  const plan::TileShapes shapes = {{192, 128}, {64, 128}, 1};
  Masks masks(6, 1, 2, 300, 200);
  masks.dense<uint8_t>('r', false, 1);
  std::vector<char> buffer = poisoned_buffer(masks.program, shapes);
  const plan::Plan plan = plan::view(masks.program, shapes, buffer.data());
  build(masks.program, plan::forward_only(plan));
  const BuiltPlan built{buffer, plan::forward_only(plan), buffer.data()};
  BakedPlan(masks.program, built).check(/*forward_only=*/true);
  EXPECT_EQ(*plan.backward_columns.baked, 0xa5a5a5a5u);
}

}  // namespace
}  // namespace anymask::cuda
