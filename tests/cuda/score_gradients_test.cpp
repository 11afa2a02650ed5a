// Gradients of score options: what can be checked of them without a GPU.
#include "cuda/score_gradients.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "cuda/emulator.h"
//
#include "cuda/device/transpose_bits.h"

namespace anymask::cuda {
namespace {

TEST(TransposeBits, LanesBecomeBits) {
  std::mt19937 random(1);
  uint32_t from[32], to[32];
  for (uint32_t& word : from) word = static_cast<uint32_t>(random());
  emulate(1, 32, [&] {
    const unsigned lane = threadIdx.x;
    to[lane] = transpose_bits(from[lane], static_cast<int>(lane));
  });
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 32; ++j) ASSERT_EQ(from[i] >> j & 1, to[j] >> i & 1) << i << ", " << j;
  }
}

constexpr Device kGpu{DeviceType::cuda, 0};
constexpr int64_t kBatch = 3, kHeads = 4, kRows = 100, kKeys = 70;

Tensor tensor(DType dtype, std::initializer_list<int64_t> shape) {
  alignas(16) static int64_t somewhere;
  return Tensor(&somewhere, dtype, shape, kGpu);
}

Problem problem() {
  return {.batch = kBatch,
          .q_heads = kHeads,
          .kv_heads = 2,
          .q_len = kRows,
          .kv_len = kKeys,
          .head_dim = 64,
          .v_head_dim = 64,
          .dtype = DType::bf16,
          .device = kGpu};
}

ScoreOptions only(Tensor ScoreOptions::*option, const Tensor& value) {
  ScoreOptions options;
  options.*option = value;
  return options;
}

int64_t line_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

TEST(BackwardWorkspace, CountsWhatGradientsOfOptionsNeed) {
  const auto bytes = [](const ScoreOptions& options, const ScoreGradientViews& gradients) {
    return backward_workspace_bytes(causal(), problem(), false, options, gradients);
  };
  const int64_t plain = bytes({}, {});
  const int64_t rows = kBatch * kHeads * 128 * 8;  // two tiles of 64 rows
  const Tensor none;
  ScoreOptions capped;
  capped.softcap = 2.0;
  EXPECT_EQ(bytes(capped, {}), plain + rows);
  const Tensor sink = tensor(DType::bf16, {kHeads});
  EXPECT_EQ(bytes(only(&ScoreOptions::sink, sink), {}), plain);
  EXPECT_EQ(bytes(only(&ScoreOptions::sink, sink), {none, none, sink}), plain + rows);
  const Tensor key_bias = tensor(DType::f32, {1, 2, kKeys});
  EXPECT_EQ(bytes(only(&ScoreOptions::key_bias, key_bias), {}), plain);
  const int64_t keys = line_up(kBatch * kHeads * kKeys * 4);
  EXPECT_EQ(bytes(only(&ScoreOptions::key_bias, key_bias), {key_bias, none, none}), plain + keys);
  const Tensor columns = tensor(DType::bf16, {1, kHeads, 1, kKeys});
  EXPECT_EQ(bytes(only(&ScoreOptions::bias, columns), {none, columns, none}), plain + keys);
  // Of pairs: only what is shared and 16-bit, in tiles of 64 rows x 128 keys.
  const Tensor full = tensor(DType::bf16, {kBatch, kHeads, kRows, kKeys});
  EXPECT_EQ(bytes(only(&ScoreOptions::bias, full), {none, full, none}), plain);
  const Tensor wide = tensor(DType::f32, {1, kHeads, kRows, kKeys});
  EXPECT_EQ(bytes(only(&ScoreOptions::bias, wide), {none, wide, none}), plain);
  const Tensor shared = tensor(DType::bf16, {1, kHeads, kRows, kKeys});
  EXPECT_EQ(bytes(only(&ScoreOptions::bias, shared), {none, shared, none}),
            plain + line_up(kHeads * 2 * 64 * 128 * 4));
}

// Whether the copy engine brings a bias of 100 rows and, unless said otherwise, 72 keys.
bool in_tiles(const Tensor& bias, const Tensor& gradient, double softcap = 0, int64_t head_dim = 64,
              bool reordered = false) {
  ScoreOptions options = only(&ScoreOptions::bias, bias);
  options.softcap = softcap;
  Problem p = problem();
  p.kv_len = bias.shape[3];
  p.head_dim = head_dim;
  const Tensor none;
  const ScoreGradients gradients({options, none, gradient, none}, p, reordered);
  return (gradients.features() & kBiasTiles) != 0;
}

TEST(ScoreGradientTiles, WhatTheCopyEngineCanRead) {
  const Tensor none;
  const Tensor bias = tensor(DType::bf16, {kBatch, kHeads, kRows, 72});
  const Tensor shared = tensor(DType::bf16, {1, 1, kRows, 72});
  EXPECT_TRUE(in_tiles(bias, none));
  EXPECT_TRUE(in_tiles(bias, bias));
  EXPECT_TRUE(in_tiles(shared, shared));
  EXPECT_FALSE(in_tiles(bias, none, 30.0));
  EXPECT_FALSE(in_tiles(bias, none, 0, 192));
  EXPECT_FALSE(in_tiles(bias, none, 0, 64, true));
  EXPECT_FALSE(in_tiles(tensor(DType::f32, {1, 1, kRows, 72}), none));
  EXPECT_FALSE(in_tiles(tensor(DType::bf16, {1, 1, kRows, kKeys}), none));
  EXPECT_FALSE(in_tiles(tensor(DType::bf16, {1, kHeads, 1, 72}), none));
  Tensor expanded = bias;  // over heads and batch entries; its gradient is not
  expanded.stride[0] = expanded.stride[1] = 0;
  EXPECT_TRUE(in_tiles(expanded, bias));
  expanded.stride[2] = 0;  // over rows
  EXPECT_FALSE(in_tiles(expanded, bias));
  Tensor odd = bias;
  odd.stride[2] += 4;
  EXPECT_FALSE(in_tiles(odd, none));
  EXPECT_FALSE(in_tiles(bias, odd));
  Tensor away = bias;
  away.data = static_cast<char*>(away.data) + 8;
  EXPECT_FALSE(in_tiles(away, none));
}

TEST(ScoreGradientRounds, NoTwoPairsOfALaunchShareABias) {
  for (const int64_t batches : {int64_t{1}, kBatch}) {
    for (const int64_t heads : {int64_t{1}, kHeads}) {
      const ScoreOptions options =
          only(&ScoreOptions::bias, tensor(DType::bf16, {batches, heads, kRows, kKeys}));
      const Tensor none;
      const Problem p = problem();
      const ScoreGradients gradients({options, none, options.bias, none}, p);
      std::vector<int> visits(static_cast<size_t>(p.batch * p.kv_heads));
      for (const PairRound& round : gradients.rounds()) {
        std::vector<int64_t> owners;
        for (int i = 0; i < round.count; ++i) {
          const int64_t pair = round.first + int64_t{i} * round.step;
          ++visits.at(static_cast<size_t>(pair));
          const int64_t batch = pair / p.kv_heads, head = pair % p.kv_heads;
          const int64_t owner = (batches > 1 ? batch : 0) * p.kv_heads + (heads > 1 ? head : 0);
          EXPECT_EQ(std::count(owners.begin(), owners.end(), owner), 0);
          owners.push_back(owner);
        }
      }
      for (const int count : visits) EXPECT_EQ(count, 1);
    }
  }
}

}  // namespace
}  // namespace anymask::cuda
