// Keys selected on the GPU. Skipped without one.
#include <gtest/gtest.h>

#include <cstring>

#include "anymask/error.hpp"
#include "cuda/device_memory.h"
#include "cuda/top_keys.h"
#include "cuda/top_keys_cases.h"

namespace anymask::cuda {
namespace {

constexpr Device kGpu = {DeviceType::cuda, 0};

// A selection's memory on the GPU.
struct OnGpu {
  const Selection& selection;
  DeviceMemory scores;
  DeviceMemory ends{static_cast<size_t>(selection.keys()) * sizeof(int32_t)};
  int64_t bytes = top_keys_workspace_bytes(scores_view());
  DeviceMemory workspace{static_cast<size_t>(bytes)};

  OnGpu(const Selection& which, const std::vector<float>& values)
      : selection(which), scores(values.size() * sizeof(float)) {
    scores.put(values.data());
  }

  Tensor scores_view() const { return selection.view(scores.data(), kGpu); }

  void select(CuStream stream) const {
    anymask::top_keys(scores_view(), selection.keep, selection.q_len,
                      selection.ends_view(ends.data(), kGpu), stream, workspace.data(), bytes);
  }

  std::vector<int32_t> result() const {
    const std::vector<char> all = ends.get();
    std::vector<int32_t> rows(all.size() / sizeof(int32_t));
    std::memcpy(rows.data(), all.data(), all.size());
    return rows;
  }
};

std::vector<int32_t> select_on_gpu(const Selection& selection, const std::vector<float>& scores) {
  const OnGpu call(selection, scores);
  call.ends.poison();
  call.workspace.poison();
  call.select(nullptr);
  return call.result();
}

TEST(TopKeysOnGpu, SmallSetMatchesTheCpu) {
  ANYMASK_NEEDS_GPU();
  for (const Selection& selection : kSelections) check_selection(selection, select_on_gpu);
}

TEST(TopKeysOnGpu, LargeSetMatchesTheCpu) {
  ANYMASK_NEEDS_GPU();
  for (const Selection& selection : kLargeSelections) check_selection(selection, select_on_gpu);
}

TEST(TopKeysOnGpu, IsCapturedInAGraphAndFollowsItsInputs) {
  ANYMASK_NEEDS_GPU();
  const Selection selection = {"graph", 1, 2, 5000, 5000, 500, normal};
  std::vector<float> scores = selection.scores();
  const OnGpu call(selection, scores);
  const CapturedGraph graph([&](CuStream stream) { call.select(stream); });
  for (int round = 0; round < 3; ++round) {
    for (size_t i = 0; i < scores.size(); ++i) scores[i] = scores[(i * 7 + 3) % scores.size()];
    call.scores.put(scores.data());
    call.ends.poison();
    graph.replay();
    EXPECT_EQ(call.result(), select_on_cpu(selection, scores));
  }
}

TEST(TopKeysOnGpu, RefusesTooLittleWorkspace) {
  ANYMASK_NEEDS_GPU();
  const Selection selection = {"workspace", 1, 1, 100, 100, 5, normal};
  const OnGpu call(selection, selection.scores());
  const Tensor ends = selection.ends_view(call.ends.data(), kGpu);
  EXPECT_THROW(anymask::top_keys(call.scores_view(), 5, 100, ends, nullptr, call.workspace.data(),
                                 call.bytes - 1),
               InvalidValue);
  EXPECT_THROW(anymask::top_keys(call.scores_view(), 5, 100, ends), InvalidValue);
  call.select(nullptr);
  EXPECT_EQ(call.result(), select_on_cpu(selection, selection.scores()));
}

}  // namespace
}  // namespace anymask::cuda
