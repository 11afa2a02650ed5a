// Plans built on the GPU. Skipped without one.
#include <gtest/gtest.h>

#include "cuda/device_memory.h"
#include "cuda/plan.h"
#include "cuda/plan_cases.h"

namespace anymask::cuda {
namespace {

TEST(PlanOnGpu, MatchesPlanOnCpu) {
  ANYMASK_NEEDS_GPU();
  check_all_plans([](Masks& masks, const plan::TileShapes& shapes) {
    DeviceCopies copies;
    const Program program = masks.arrays.moved(masks.program, [&](const std::vector<char>& bytes) {
      return copies.add(bytes);
    });
    const DeviceMemory buffer(static_cast<size_t>(plan::bytes_needed(program, shapes)));
    buffer.poison();
    const plan::Plan plan = plan::view(program, shapes, buffer.data());
    build_plan(program, plan, 0, nullptr);
    return BuiltPlan{buffer.get(), plan, buffer.data()};
  });
}

}  // namespace
}  // namespace anymask::cuda
