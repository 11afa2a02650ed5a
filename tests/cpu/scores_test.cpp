// Score options through the C++ API: what each is the same as, said with other means.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"
#include "rules/philox.h"

namespace anymask::testing {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t batch = 2, q_len = 150, kv_len = 201, q_heads = 4, kv_heads = 2, dim = 24;
};

std::vector<float> draw(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = normal(random);
  return values;
}

// A call's memory; keys may be made to be one more than are drawn.
struct Call {
  Sizes s;
  int64_t keys;
  std::vector<float> q, k, v, dout, out, lse, dq, dk, dv;
  ScoreOptions scores;
  Tensor dkey_bias, dbias, dsink;
  Mask mask;

  Call(const Sizes& sizes, int64_t more_keys, uint32_t seed)
      : s(sizes), keys(sizes.kv_len + more_keys) {
    std::mt19937 random(seed);
    q = draw(s.batch * s.q_len * s.q_heads * s.dim, random);
    dout = draw(s.batch * s.q_len * s.q_heads * s.dim, random);
    for (std::vector<float>* x : {&k, &v}) {
      const int64_t row = s.kv_heads * s.dim;
      const std::vector<float> drawn = draw(s.batch * s.kv_len * row, random);
      x->assign(static_cast<size_t>(s.batch * keys * row), 0.0f);
      for (int64_t b = 0; b < s.batch; ++b) {
        std::copy_n(drawn.begin() + b * s.kv_len * row, s.kv_len * row,
                    x->begin() + b * keys * row);
      }
    }
    out.assign(q.size(), NAN), dq.assign(q.size(), NAN);
    dk.assign(k.size(), NAN), dv.assign(k.size(), NAN);
    lse.assign(static_cast<size_t>(s.batch * s.q_heads * s.q_len), NAN);
  }

  void run() {
    const auto rows = [&](std::vector<float>& x, int64_t length, int64_t heads) {
      return Tensor(x.data(), DType::f32, {s.batch, length, heads, s.dim});
    };
    ForwardArgs f;
    f.q = rows(q, s.q_len, s.q_heads), f.out = rows(out, s.q_len, s.q_heads);
    f.k = rows(k, keys, s.kv_heads), f.v = rows(v, keys, s.kv_heads);
    f.lse = Tensor(lse.data(), DType::f32, {s.batch, s.q_heads, s.q_len});
    f.mask = mask;
    f.scores = scores;
    attention_forward(f);
    BackwardArgs g;
    g.q = f.q, g.k = f.k, g.v = f.v, g.out = f.out, g.lse = f.lse;
    g.dout = rows(dout, s.q_len, s.q_heads);
    g.dq = rows(dq, s.q_len, s.q_heads);
    g.dk = rows(dk, keys, s.kv_heads), g.dv = rows(dv, keys, s.kv_heads);
    g.dkey_bias = dkey_bias, g.dbias = dbias, g.dsink = dsink;
    g.mask = mask;
    g.scores = scores;
    attention_backward(g);
  }
};

void expect_near(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // infinities too
    ASSERT_NEAR(a[i], b[i], tolerance) << "at " << i;
  }
}

class CpuScores : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_cpu_instruction_set(GetParam()); }
  void TearDown() override { set_cpu_instruction_set(cpu_instruction_sets().back()); }
};
INSTANTIATE_TEST_SUITE_P(All, CpuScores, ::testing::ValuesIn(cpu_instruction_sets()));

TEST_P(CpuScores, ASinkIsAKeyWithoutAValue) {
  const Sizes s;
  std::vector<float> sink{0.5f, -1.0f, 3.0f, kHidden}, dsink(4, NAN);
  Call one(s, 0, 1);
  one.scores.sink = Tensor(sink.data(), DType::f32, {s.q_heads});
  one.dsink = Tensor(dsink.data(), DType::f32, {s.q_heads});
  one.run();

  Call two(s, 1, 1);  // the last key and value are zeros
  std::vector<float> bias(static_cast<size_t>(s.q_heads * two.keys), 0.0f);
  std::vector<float> gradient(bias.size(), NAN);
  for (int64_t h = 0; h < s.q_heads; ++h) {
    bias[static_cast<size_t>((h + 1) * two.keys - 1)] = sink[static_cast<size_t>(h)];
  }
  two.scores.key_bias = Tensor(bias.data(), DType::f32, {1, s.q_heads, two.keys});
  two.dkey_bias = Tensor(gradient.data(), DType::f32, {1, s.q_heads, two.keys});
  two.run();

  expect_near(one.out, two.out, 1e-5);
  expect_near(one.lse, two.lse, 1e-5);
  expect_near(one.dq, two.dq, 1e-5);
  for (int64_t h = 0; h < s.q_heads; ++h) {
    EXPECT_NEAR(dsink[static_cast<size_t>(h)],
                gradient[static_cast<size_t>((h + 1) * two.keys - 1)], 2e-4);
  }
}

TEST_P(CpuScores, AKeyBiasIsABiasOfAllRows) {
  const Sizes s;
  std::mt19937 random(2);
  const int64_t count = s.batch * s.q_heads * s.kv_len;
  std::vector<float> bias = draw(count, random);
  for (size_t i = 0; i < bias.size(); i += 7) bias[i] = kHidden;
  std::vector<float> first(bias.size(), NAN), second(bias.size(), NAN), full;
  full.assign(static_cast<size_t>(count * s.q_len), NAN);

  Call one(s, 0, 3), two(s, 0, 3), three(s, 0, 3);
  one.scores.key_bias = Tensor(bias.data(), DType::f32, {s.batch, s.q_heads, s.kv_len});
  one.dkey_bias = Tensor(first.data(), DType::f32, {s.batch, s.q_heads, s.kv_len});
  two.scores.bias = Tensor(bias.data(), DType::f32, {s.batch, s.q_heads, 1, s.kv_len});
  two.dbias = Tensor(second.data(), DType::f32, {s.batch, s.q_heads, 1, s.kv_len});
  three.scores.bias = Tensor(bias.data(), DType::f32, {s.batch, s.q_heads, s.q_len, s.kv_len});
  const int64_t strides[] = {s.q_heads * s.kv_len, s.kv_len, 0, 1};
  std::copy_n(strides, 4, three.scores.bias.stride);
  three.dbias = Tensor(full.data(), DType::f32, {s.batch, s.q_heads, s.q_len, s.kv_len});
  for (Call* call : {&one, &two, &three}) {
    call->mask = causal().reordered();
    call->run();
  }
  EXPECT_EQ(one.out, two.out);
  EXPECT_EQ(one.out, three.out);
  EXPECT_EQ(one.dk, two.dk);
  EXPECT_EQ(first, second);
  std::vector<float> sums(bias.size());
  for (int64_t i = 0; i < count * s.q_len; ++i) {
    sums[static_cast<size_t>(i / (s.q_len * s.kv_len) * s.kv_len + i % s.kv_len)] +=
        full[static_cast<size_t>(i)];
  }
  expect_near(first, sums, 1e-4);
}

TEST_P(CpuScores, MinusInfinityIsAMask) {
  const Sizes s;
  std::mt19937 random(4);
  std::vector<float> bias(static_cast<size_t>(s.batch * s.q_len * s.kv_len));
  std::vector<uint8_t> allowed(bias.size());
  for (size_t i = 0; i < bias.size(); ++i) {
    allowed[i] = random() % 3 != 0 && i / static_cast<size_t>(s.kv_len) % 5 != 0;
    bias[i] = allowed[i] != 0 ? 0 : kHidden;
  }
  Call one(s, 0, 5), two(s, 0, 5);
  one.scores.bias = Tensor(bias.data(), DType::f32, {s.batch, 1, s.q_len, s.kv_len});
  two.mask = dense(Tensor(allowed.data(), DType::u8, {s.batch, 1, s.q_len, s.kv_len}));
  one.run();
  two.run();
  expect_near(one.out, two.out, 1e-5);
  expect_near(one.lse, two.lse, 1e-5);
  expect_near(one.dq, two.dq, 1e-5);
  expect_near(one.dk, two.dk, 1e-5);
  expect_near(one.dv, two.dv, 1e-5);
}

TEST_P(CpuScores, ALargeSoftcapChangesNothing) {
  const Sizes s;
  Call one(s, 0, 6), two(s, 0, 6);
  two.scores.softcap = 1e4;
  one.run();
  two.run();
  expect_near(one.out, two.out, 1e-5);
  expect_near(one.lse, two.lse, 1e-5);
  expect_near(one.dk, two.dk, 1e-5);
}

// Dropped pairs count in lse but have no value: a value at one key is either lost or scaled.
TEST_P(CpuScores, DropoutScalesWhatItKeeps) {
  const Sizes s{1, 40, 70, 1, 1, 8};
  std::vector<int64_t> seed_offset{5, 6};
  Call one(s, 0, 7), two(s, 0, 7);
  const int keys[8] = {0, 5, 18, 31, 37, 46, 63, 69};  // each has a column of its own
  for (Call* call : {&one, &two}) {
    std::fill(call->v.begin(), call->v.end(), 0.0f);
    for (size_t i = 0; i < 8; ++i) call->v[static_cast<size_t>(keys[i]) * 8 + i] = 1.0f;
  }
  two.scores.dropout_p = 0.25;
  two.scores.seed_offset = Tensor(seed_offset.data(), DType::i64, {2});
  one.run();
  two.run();
  expect_near(one.lse, two.lse, 1e-5);
  const uint32_t digits = rules::digits_of(rules::dropout_threshold(0.25));
  const rules::Dropout dropout = rules::dropout_of(5, 6, 0, 0, digits);
  int dropped = 0;
  for (size_t row = 0; row < 40; ++row) {
    for (size_t i = 0; i < 8; ++i) {
      const auto kept = rules::kept_keys<rules::ScalarWords>(dropout, static_cast<uint32_t>(row),
                                                             static_cast<uint32_t>(keys[i] / 64));
      const int key = keys[i] % 64;
      const bool lost = (kept.word[rules::word_of_key(key)] >> rules::bit_of_key(key) & 1u) == 0;
      const float expected = lost ? 0 : one.out[row * 8 + i] / 0.75f;
      EXPECT_NEAR(two.out[row * 8 + i], expected, 1e-6) << "row " << row << " key " << keys[i];
      dropped += lost;
    }
  }
  EXPECT_GT(dropped, 50);
  EXPECT_LT(dropped, 110);
}

}  // namespace
}  // namespace anymask::testing
