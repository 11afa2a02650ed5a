// Plans built on the GPU. Skipped without one.
#include <gtest/gtest.h>

#include <thread>

#include "anymask/error.hpp"
#include "cuda/baked_cases.h"
#include "cuda/device_memory.h"
#include "cuda/plan.h"
#include "cuda/plan_cases.h"

namespace anymask::cuda {
namespace {

BuiltPlan build_on_gpu(const Masks& masks, const plan::TileShapes& shapes) {
  DeviceCopies copies;
  const Program program = masks.arrays.moved(
      masks.program, [&](const std::vector<char>& bytes) { return copies.add(bytes); });
  const DeviceMemory buffer(static_cast<size_t>(plan::bytes_needed(program, shapes)));
  const DeviceMemory scratch(static_cast<size_t>(plan_scratch_bytes(program)));
  buffer.poison();
  scratch.poison();
  const plan::Plan plan = plan::view(program, shapes, buffer.data());
  build_plan(program, plan, scratch.data(), 0, nullptr);
  return {buffer.get(), plan, buffer.data()};
}

TEST(PlanOnGpu, MatchesPlanOnCpu) {
  ANYMASK_NEEDS_GPU();
  check_plans(/*quickly=*/false, build_on_gpu);
}

// For runs under compute-sanitizer.
TEST(PlanOnGpu, SmallSetMatchesPlanOnCpu) {
  ANYMASK_NEEDS_GPU();
  check_plans(/*quickly=*/true, build_on_gpu);
}

TEST(PlanOnGpu, BakesTheBitsOfMasksWithDenseLeaves) {
  ANYMASK_NEEDS_GPU();
  check_baked_plans(build_on_gpu);
}

// Run by itself, this also loads the kernels inside the capture.
TEST(PlanOnGpu, IsCapturedInAGraphAndFollowsItsInputs) {
  ANYMASK_NEEDS_GPU();
  constexpr int kLength = 2000;
  constexpr plan::TileShapes kShapes = {{192, 128}, {64, 128}, 1};
  std::vector<uint8_t> allowed(kLength * kLength, 0);
  Program host{.count = 1, .q_len = kLength, .kv_len = kLength};
  host.nodes[0] = Node{.op = Op::kDense};
  host.nodes[0].columns = {.row_stride = kLength, .column_stride = 1, .bytes = 1};
  Program program = host;
  const DeviceMemory mask(allowed.size());
  mask.put(allowed.data());
  program.nodes[0].columns.data = mask.data();
  host.nodes[0].columns.data = allowed.data();

  const DeviceMemory buffer(static_cast<size_t>(plan::bytes_needed(program, kShapes)));
  const plan::Plan plan = plan::view(program, kShapes, buffer.data());
  const CapturedGraph graph(
      [&](CuStream stream) { build_plan(program, plan, nullptr, 0, stream); });

  Random random(5);
  for (int round = 0; round < 3; ++round) {
    for (size_t i = 0; i < allowed.size(); ++i) {
      allowed[i] = i % 300 == 0 ? random.below(3) == 0 : allowed[i - 1];
    }
    mask.put(allowed.data());
    buffer.poison();
    graph.replay();
    const BuiltPlan built{buffer.get(), plan, buffer.data()};
    expect_same_plan(host, kShapes, built);
    BakedPlan(host, built).check();
  }
}

TEST(KernelOnGpu, ManyThreadsAskAtOnce) {
  ANYMASK_NEEDS_GPU();
  for (const KernelConfig& config : plan_kernels()) {
    std::vector<const Kernel*> answers(8, nullptr);
    std::vector<std::thread> threads;
    for (const Kernel*& answer : answers) {
      threads.emplace_back([&answer, &config] { answer = &kernel(config, 0); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const Kernel* answer : answers) EXPECT_EQ(answer, answers[0]);
    EXPECT_NE(answers[0]->handle, nullptr);
  }
}

TEST(KernelOnGpu, AFailedLaunchIsReportedAndTheNextOneWorks) {
  ANYMASK_NEEDS_GPU();
  const Kernel& order = kernel(plan_kernels()[2], 0);
  const OrderParams nothing{};
  EXPECT_THROW(launch(order, Grid{0}, nullptr, nothing), RuntimeFailure);
  EXPECT_NO_THROW(launch(order, Grid{1}, nullptr, nothing));
  EXPECT_EQ(driver().cuStreamSynchronize(nullptr), kCuSuccess);
}

}  // namespace
}  // namespace anymask::cuda
