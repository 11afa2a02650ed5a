// The C ABI: codes match the C++ enums, statuses match exceptions, messages come through.
#include "anymask/anymask.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "anymask/anymask.hpp"

namespace {

using anymask::DType;
using anymask::MaskKind;

template <typename Enum>
constexpr int32_t code(Enum value) {
  return static_cast<int32_t>(value);
}
static_assert(ANYMASK_F32 == code(DType::f32) && ANYMASK_F16 == code(DType::f16));
static_assert(ANYMASK_BF16 == code(DType::bf16) && ANYMASK_F64 == code(DType::f64));
static_assert(ANYMASK_I32 == code(DType::i32) && ANYMASK_I64 == code(DType::i64));
static_assert(ANYMASK_U8 == code(DType::u8) && ANYMASK_I8 == code(DType::i8));
static_assert(ANYMASK_I16 == code(DType::i16));
static_assert(ANYMASK_CAUSAL == code(MaskKind::causal));
static_assert(ANYMASK_SLIDING_WINDOW == code(MaskKind::sliding_window));
static_assert(ANYMASK_PREFIX_LM == code(MaskKind::prefix_lm));
static_assert(ANYMASK_DOCUMENTS == code(MaskKind::documents));
static_assert(ANYMASK_CU_DOCUMENTS == code(MaskKind::cu_documents));
static_assert(ANYMASK_INTERVALS == code(MaskKind::intervals));
static_assert(ANYMASK_BLOCKS == code(MaskKind::blocks));
static_assert(ANYMASK_DENSE == code(MaskKind::dense) && ANYMASK_IDS == code(MaskKind::ids));
static_assert(ANYMASK_NOT == code(MaskKind::logical_not));
static_assert(ANYMASK_AND == code(MaskKind::logical_and));
static_assert(ANYMASK_OR == code(MaskKind::logical_or));
static_assert(ANYMASK_REORDERED == code(MaskKind::reordered));

anymask_problem small_problem() {
  anymask_problem problem{};
  problem.batch = 1;
  problem.q_heads = problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 50;
  problem.head_dim = problem.v_head_dim = 16;
  return problem;
}

TEST(CApi, StatisticsOfACausalMask) {
  anymask_node node{};
  node.kind = ANYMASK_CAUSAL;
  const anymask_mask mask{&node, 1};
  const anymask_problem problem = small_problem();
  anymask_statistics statistics{};
  ASSERT_EQ(anymask_mask_statistics(&mask, &problem, 16, 16, &statistics), ANYMASK_OK);
  EXPECT_EQ(statistics.visible_pairs, 50 * 51 / 2);
  int64_t bytes = 0;
  ASSERT_EQ(anymask_plan_bytes(&mask, &problem, &bytes), ANYMASK_OK);
  EXPECT_GT(bytes, 0);
  EXPECT_EQ(anymask_build_forward_plan(&mask, &problem, nullptr, bytes - 1, nullptr),
            ANYMASK_INVALID_VALUE);
}

TEST(CApi, ErrorsComeAsStatusAndMessagePerThread) {
  anymask_node node{};
  node.kind = ANYMASK_NOT;
  const anymask_mask mask{&node, 1};
  const anymask_problem problem = small_problem();
  int64_t bytes = 0;
  EXPECT_EQ(anymask_plan_bytes(&mask, &problem, &bytes), ANYMASK_INVALID_VALUE);
  EXPECT_NE(std::strstr(anymask_last_error(), "~ without an operand"), nullptr);
  std::thread([] { EXPECT_STREQ(anymask_last_error(), ""); }).join();
  EXPECT_EQ(anymask_set_cpu_instruction_set("abacus"), ANYMASK_INVALID_VALUE);
  EXPECT_NE(std::strstr(anymask_last_error(), "abacus"), nullptr);
  EXPECT_EQ(anymask_set_cpu_threads(-1), ANYMASK_INVALID_VALUE);
  char tiny[2];
  EXPECT_EQ(anymask_cpu_instruction_set(tiny, 2), ANYMASK_INVALID_VALUE);
}

TEST(CApi, RefusesUnknownCodes) {
  anymask_node node{};
  node.kind = ANYMASK_DENSE;
  node.arrays[0].ndim = 4;
  node.arrays[0].dtype = 77;
  const anymask_mask mask{&node, 1};
  const anymask_problem problem = small_problem();
  int64_t bytes = 0;
  EXPECT_EQ(anymask_plan_bytes(&mask, &problem, &bytes), ANYMASK_INVALID_TYPE);
  node.arrays[0].ndim = 5;
  EXPECT_EQ(anymask_plan_bytes(&mask, &problem, &bytes), ANYMASK_INVALID_VALUE);
}

TEST(CApi, SelectsTopKeys) {
  float scores[4] = {1.0f, 3.0f, 2.0f, 4.0f};
  int32_t ends[4] = {};
  const anymask_tensor s{scores, ANYMASK_F32, ANYMASK_CPU, 0, 3, {1, 1, 4, 1}, {4, 4, 1, 1}};
  const anymask_tensor e{ends, ANYMASK_I32, ANYMASK_CPU, 0, 4, {1, 1, 4, 1}, {4, 4, 1, 1}};
  int64_t bytes = -1;
  ASSERT_EQ(anymask_top_keys_workspace_bytes(&s, &bytes), ANYMASK_OK);
  EXPECT_EQ(bytes, 0);
  ASSERT_EQ(anymask_top_keys(&s, 2, 4, &e, nullptr, nullptr, 0), ANYMASK_OK);
  EXPECT_EQ(std::vector<int32_t>(ends, ends + 4), (std::vector<int32_t>{2, 4, 3, 4}));
  EXPECT_EQ(anymask_top_keys(&s, -2, 4, &e, nullptr, nullptr, 0), ANYMASK_INVALID_VALUE);
  EXPECT_NE(std::strstr(anymask_last_error(), "keep is -2; it must be 0 or more"), nullptr);
}

TEST(CApi, InstructionSetsAreListedAndTheBestIsUsed) {
  char names[256], name[64];
  ASSERT_EQ(anymask_cpu_instruction_sets(names, sizeof names), ANYMASK_OK);
  ASSERT_EQ(anymask_cpu_instruction_set(name, sizeof name), ANYMASK_OK);
  EXPECT_NE(std::strstr(names, "baseline"), nullptr);
  EXPECT_NE(std::strstr(names, name), nullptr);
}

TEST(CApi, TheCudaReportSaysHowMuchRoomItNeeds) {
  int64_t size = 0;
  EXPECT_EQ(anymask_cuda_report(nullptr, &size), ANYMASK_INVALID_VALUE);
  ASSERT_GT(size, 1);
  std::vector<char> json(static_cast<size_t>(size));
  ASSERT_EQ(anymask_cuda_report(json.data(), &size), ANYMASK_OK);
  EXPECT_EQ(json[0], '{');
  EXPECT_NE(std::strstr(json.data(), "\"driver\""), nullptr);
}

}  // namespace
