// What lowering refuses, by message, and what it makes of trees.
#include "mask/lower.h"

#include <gtest/gtest.h>

#include <vector>

#include "anymask/anymask.hpp"

namespace anymask {
namespace {

const Problem kProblem{.batch = 2,
                       .q_heads = 6,
                       .kv_heads = 2,
                       .q_len = 100,
                       .kv_len = 100,
                       .head_dim = 16,
                       .v_head_dim = 16};

template <typename Error>
void expect_refused(const Mask& mask, const std::string& words) {
  try {
    lower(mask, kProblem);
    FAIL() << "accepted; expected: " << words;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

int32_t memory[4096];

Tensor i32(std::initializer_list<int64_t> shape) { return Tensor(memory, DType::i32, shape); }

TEST(Lower, RefusesWrongIntervals) {
  expect_refused<InvalidValue>(intervals(i32({1, 1, 100, 4}), true), "n = 1 or 2 (causal)");
  expect_refused<InvalidValue>(intervals(i32({1, 1, 100, 1}), false), "n = 2 or 4");
  expect_refused<InvalidValue>(intervals(i32({1, 1, 99, 1}), true), "kv_len = 100");
  expect_refused<InvalidValue>(intervals(i32({3, 1, 100, 1}), true), "batch must be 1 or 2");
  expect_refused<InvalidValue>(intervals(i32({1, 4, 100, 1}), true),
                               "4 mask heads must divide the 6 query heads");
  expect_refused<InvalidType>(intervals(Tensor(memory, DType::f32, {1, 1, 100, 1}), true),
                              "it needs int32");
}

TEST(Lower, RefusesOtherWrongLeaves) {
  expect_refused<InvalidValue>(blocks(i32({1, 1, 1, 1}), 100, 128), "multiples of 16");
  expect_refused<InvalidValue>(blocks(i32({1, 1, 2, 1})), "[batch or 1, mask heads, 1, 1]");
  expect_refused<InvalidValue>(dense(i32({100, 99})), "kv_len = 100");
  expect_refused<InvalidValue>(documents(i32({99})), "q_len = 100");
  expect_refused<InvalidValue>(ids(i32({1, 1, 100}), Tensor()), "ids: ek is missing");
  expect_refused<InvalidType>(ids(Tensor(memory, DType::u8, {1, 1, 100}), i32({1, 1, 100})),
                              "ids: eq has type uint8");
  expect_refused<InvalidType>(documents(Tensor(memory, DType::i32, {100}, {DeviceType::cuda, 1})),
                              "documents: q_ids is on cuda:1; it must be on cpu");
  expect_refused<InvalidValue>(prefix_lm(i32({3})), "[1] or [batch]");
}

TEST(Lower, RefusesBrokenTrees) {
  MaskNode join;
  join.kind = MaskKind::logical_and;
  expect_refused<InvalidValue>(Mask(std::vector<MaskNode>{join}), "without two operands");
  expect_refused<InvalidValue>(Mask(std::vector<MaskNode>{}), "do not form one tree");
  expect_refused<InvalidValue>(Mask(std::vector<MaskNode>{MaskNode{}, MaskNode{}}),
                               "do not form one tree");
  MaskNode unknown;
  unknown.kind = static_cast<MaskKind>(55);
  expect_refused<InvalidValue>(Mask(unknown), "unknown node kind 55");
  Mask large;
  for (int i = 0; i < 20; ++i) large = large & full();
  expect_refused<InvalidValue>(large, "at most 32");
}

TEST(Lower, OrdersOperandsSoThatFiveStackPlacesAreEnough) {
  Mask right_leaning = full();
  for (int i = 0; i < 15; ++i) right_leaning = full() & right_leaning;
  EXPECT_EQ(lower(right_leaning, kProblem).count, 31);
}

TEST(Lower, TakesTheLeastCommonMaskHeads) {
  const Mask mask = intervals(i32({1, 2, 100, 1}), true) & intervals(i32({2, 3, 100, 1}), true);
  const rules::Program program = lower(mask, kProblem);
  EXPECT_EQ(program.heads, 6);
  EXPECT_EQ(program.batches, 2);
}

TEST(Lower, RefusesImpossibleSizes) {
  Problem huge = kProblem;
  huge.kv_len = int64_t{1} << 30;
  EXPECT_THROW(lower(full(), huge), InvalidValue);
  huge.kv_len = -1;
  EXPECT_THROW(lower(full(), huge), InvalidValue);
}

}  // namespace
}  // namespace anymask
