// When the backward pass makes dQ apart from dK and dV, as far as that is known before the mask is.
#include "cuda/backward_split.h"

#include <gtest/gtest.h>

#include "cuda/backward_variants.h"

namespace anymask::cuda {
namespace {

constexpr int32_t kFar = 1 << 30;

struct Call {
  int64_t batch = 1, q_heads = 8, kv_heads = 8, q_len = 2048, kv_len = 2048, head_dim = 128;
  int32_t band_lo = -kFar;
  int32_t features = 0;
  int32_t chained = kUnchained;
  bool reordered = false, adds_keys = false;

  SplitUse use() const {
    Gpu gpu{};
    gpu.multiprocessors = 132;
    const Problem problem{.batch = batch,
                          .q_heads = q_heads,
                          .kv_heads = kv_heads,
                          .q_len = q_len,
                          .kv_len = kv_len,
                          .head_dim = head_dim,
                          .v_head_dim = head_dim,
                          .dtype = DType::bf16};
    rules::Program program{.count = 1};
    program.nodes[0] = {.op = rules::Op::kBand,
                        .lo = band_lo,
                        .hi = static_cast<int32_t>(kv_len - q_len)};  // causal
    const int32_t order = 0;
    if (reordered) program.key_order = &order;
    const BackwardConfig config =
        backward_variant(head_dim, head_dim, false, MaskPath::kRuns, chained, features, adds_keys);
    return split_use(program, problem, config, gpu);
  }
};

TEST(BackwardSplit, IsAllThatIsLaunchedForCausalCallsOfFewItems) {
  EXPECT_EQ(Call{}.use(), SplitUse::kAlone);
  EXPECT_EQ((Call{.q_heads = 32}).use(), SplitUse::kAlone) << "grouped heads";
  EXPECT_EQ((Call{.q_len = 1500}).use(), SplitUse::kAlone);
  EXPECT_EQ((Call{.head_dim = 72}).use(), SplitUse::kAlone);
  EXPECT_NE((Call{.head_dim = 64}).use(), SplitUse::kAlone);
  EXPECT_EQ((Call{.q_heads = 16, .kv_heads = 16}).use(), SplitUse::kAlone) << "256 items";
  EXPECT_NE((Call{.q_heads = 17, .kv_heads = 17}).use(), SplitUse::kAlone) << "272";
  EXPECT_EQ((Call{.q_heads = 32, .kv_heads = 32, .chained = kOrdered}).use(), SplitUse::kAlone);
}

TEST(BackwardSplit, ItsTilesMustBeBalanced) {
  EXPECT_EQ((Call{.band_lo = -100}).use(), SplitUse::kNever) << "a window";
  EXPECT_EQ((Call{.q_len = 900}).use(), SplitUse::kNever) << "one row tile meets most keys";
  EXPECT_EQ((Call{.reordered = true}).use(), SplitUse::kNever);
  EXPECT_EQ((Call{.q_heads = 4, .kv_heads = 4, .adds_keys = true}).use(), SplitUse::kNever);
}

TEST(BackwardSplit, IsForThePlanToChooseWhereRowsAreMany) {
  EXPECT_EQ((Call{.batch = 4, .q_heads = 32, .kv_heads = 32}).use(), SplitUse::kByPlan);
  EXPECT_EQ((Call{.batch = 4, .q_heads = 32, .kv_heads = 32, .band_lo = -100}).use(),
            SplitUse::kByPlan);
}

TEST(BackwardSplit, IsNotForAllCalls) {
  EXPECT_EQ((Call{.head_dim = 136}).use(), SplitUse::kNever);
  EXPECT_EQ((Call{.features = kSoftcap}).use(), SplitUse::kNever);
  EXPECT_EQ((Call{.q_len = 0}).use(), SplitUse::kNever);
}

}  // namespace
}  // namespace anymask::cuda
