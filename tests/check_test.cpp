// Every check of a call's tensors, by message; and that a good call works after a refused one.
#include "check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "anymask/anymask.hpp"

namespace anymask {
namespace {

// A call with shapes that fit, to be spoiled one argument at a time.
struct Call {
  std::vector<float> q = std::vector<float>(2 * 5 * 4 * 16, 0.5f);
  std::vector<float> k = std::vector<float>(2 * 7 * 2 * 16, 0.25f);
  std::vector<float> v = std::vector<float>(2 * 7 * 2 * 8, 1.5f);
  std::vector<float> out = std::vector<float>(2 * 5 * 4 * 8);
  std::vector<float> lse = std::vector<float>(2 * 4 * 5);
  ForwardArgs args;

  Call() {
    args.q = Tensor(q.data(), DType::f32, {2, 5, 4, 16});
    args.k = Tensor(k.data(), DType::f32, {2, 7, 2, 16});
    args.v = Tensor(v.data(), DType::f32, {2, 7, 2, 8});
    args.out = Tensor(out.data(), DType::f32, {2, 5, 4, 8});
    args.lse = Tensor(lse.data(), DType::f32, {2, 4, 5});
  }
};

template <typename Error>
void expect_refused(const std::function<void(ForwardArgs&)>& spoil, const std::string& words) {
  Call call;
  ForwardArgs good = call.args;
  spoil(call.args);
  try {
    attention_forward(call.args);
    FAIL() << "accepted; expected: " << words;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
  attention_forward(good);
  EXPECT_FLOAT_EQ(call.out[0], 1.5f);
}

TEST(Check, RefusesWrongShapes) {
  expect_refused<InvalidValue>([](auto& a) { a.q.ndim = 3; }, "q has shape [2, 5, 4]");
  expect_refused<InvalidValue>([](auto& a) { a.k.shape[0] = 3; }, "k has shape [3, 7, 2, 16]");
  expect_refused<InvalidValue>([](auto& a) { a.k.shape[3] = 8; }, "k has shape [2, 7, 2, 8]");
  expect_refused<InvalidValue>([](auto& a) { a.v.shape[1] = 6; }, "v has shape [2, 6, 2, 8]");
  expect_refused<InvalidValue>([](auto& a) { a.q.shape[2] = 3; }, "q has 3 heads and k has 2");
  expect_refused<InvalidValue>([](auto& a) { a.out.shape[3] = 16; }, "out has shape");
  expect_refused<InvalidValue>([](auto& a) { a.lse.shape[2] = 6; }, "lse has shape [2, 4, 6]");
  expect_refused<InvalidValue>([](auto& a) { a.q.shape[3] = a.k.shape[3] = 12; },
                               "q has head_dim 12");
  expect_refused<InvalidValue>([](auto& a) { a.v.shape[3] = 264; }, "v has head_dim 264");
}

TEST(Check, RefusesWrongTypesAndDevices) {
  expect_refused<InvalidType>([](auto& a) { a.q.dtype = DType::i32; }, "q has type int32");
  expect_refused<InvalidType>([](auto& a) { a.k.dtype = DType::bf16; },
                              "k has type bfloat16; it needs the type of q, float32");
  expect_refused<InvalidType>([](auto& a) { a.lse.dtype = DType::f64; }, "lse has type float64");
  expect_refused<InvalidType>(
      [](auto& a) {
        a.v.device = {DeviceType::cuda, 0};
      },
      "v is on cuda:0; q is on cpu");
}

TEST(Check, RefusesWrongMemory) {
  expect_refused<InvalidValue>([](auto& a) { a.q.stride[3] = 2; }, "q has stride 2");
  expect_refused<InvalidValue>([](auto& a) { a.out.stride[0] = 0; }, "out is an output");
  expect_refused<InvalidValue>([](auto& a) { a.v.data = nullptr; }, "v has no memory");
  expect_refused<InvalidValue>([](auto& a) { a.k.data = static_cast<char*>(a.k.data) + 2; },
                               "k is not aligned");
}

TEST(Check, RefusesWrongScaleAndPlan) {
  expect_refused<InvalidValue>([](auto& a) { a.scale = INFINITY; }, "scale is inf");
  expect_refused<InvalidValue>(
      [](auto& a) {
        static char other[64];
        a.plan = other;
        a.plan_bytes = 64;
      },
      "plan has 64 bytes");
}

TEST(Check, RefusesWrongScoreOptions) {
  static std::vector<float> memory(2 * 4 * 5 * 7);
  const auto option = [](std::initializer_list<int64_t> shape, DType dtype = DType::f32) {
    return Tensor(memory.data(), dtype, shape);
  };
  expect_refused<InvalidValue>([](auto& a) { a.scores.softcap = -1; }, "softcap is -1");
  expect_refused<InvalidValue>([](auto& a) { a.scores.softcap = NAN; }, "softcap is");
  expect_refused<InvalidValue>([](auto& a) { a.scores.dropout_p = 1; }, "dropout_p is 1.0");
  expect_refused<InvalidValue>([](auto& a) { a.scores.dropout_p = NAN; }, "dropout_p is");
  expect_refused<InvalidValue>([](auto& a) { a.scores.dropout_p = 0.1; }, "seed_offset is missing");
  expect_refused<InvalidType>(
      [&](auto& a) { a.scores.dropout_p = 0.1, a.scores.seed_offset = option({2}, DType::i32); },
      "seed_offset has type int32; it needs int64");
  expect_refused<InvalidValue>(
      [&](auto& a) { a.scores.dropout_p = 0.1, a.scores.seed_offset = option({3}, DType::i64); },
      "seed_offset has shape [3]; it needs [seed, offset]");
  expect_refused<InvalidValue>([&](auto& a) { a.scores.sink = option({2}); },
                               "sink has shape [2]; it needs [q_heads] = [4]");
  expect_refused<InvalidType>([&](auto& a) { a.scores.sink = option({4}, DType::bf16); },
                              "sink has type bfloat16; it needs the type of q, float32");
  expect_refused<InvalidValue>(
      [&](auto& a) {
        a.scores.key_bias = option({2, 3, 7});
      },
      "key_bias has shape [2, 3, 7]");
  expect_refused<InvalidValue>(
      [&](auto& a) {
        a.scores.bias = option({2, 4, 7, 7});
      },
      "bias has shape [2, 4, 7, 7]");
  expect_refused<InvalidValue>(
      [&](auto& a) {
        a.scores.bias = option({1, 1, 5, 7}), a.scores.bias.stride[3] = 2;
      },
      "bias has stride 2 in its last dimension");
  expect_refused<InvalidType>(
      [&](auto& a) {
        a.scores.bias = option({1, 1, 5, 7});
        a.scores.bias.device = {DeviceType::cuda, 0};
      },
      "bias is on cuda:0; q is on cpu");
  expect_refused<InvalidValue>(
      [&](auto& a) { a.scores.sink = option({4}), a.scores.sink.data = nullptr; },
      "sink has no memory");
}

TEST(Check, RefusesWrongGradients) {
  Call call;
  attention_forward(call.args);
  std::vector<float> dq(call.q.size()), dk(call.k.size()), dv(call.v.size());
  BackwardArgs args;
  args.q = call.args.q;
  args.k = call.args.k;
  args.v = call.args.v;
  args.out = call.args.out;
  args.lse = call.args.lse;
  args.dout = call.args.out;
  args.dq = Tensor(dq.data(), DType::f32, {2, 5, 4, 16});
  args.dk = Tensor(dk.data(), DType::f32, {2, 7, 2, 16});
  args.dv = Tensor(dv.data(), DType::f32, {2, 7, 2, 8});
  const auto refused = [](BackwardArgs spoiled, const std::string& words) {
    try {
      attention_backward(spoiled);
      FAIL() << "accepted; expected: " << words;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  BackwardArgs spoiled = args;
  spoiled.dq.shape[1] = 4;
  refused(spoiled, "dq has shape [2, 4, 4, 16]");
  spoiled = args;
  spoiled.dlse = Tensor(dq.data(), DType::f32, {2, 4, 6});
  refused(spoiled, "dlse has shape [2, 4, 6]");
  spoiled = args;
  spoiled.dout = Tensor();
  refused(spoiled, "dout is missing");
  args.scores.sink = Tensor(call.q.data(), DType::f32, {4});
  spoiled = args;
  spoiled.dsink = Tensor(dq.data(), DType::f32, {5});
  refused(spoiled, "dsink has shape [5]; it needs the shape of sink = [4]");
  spoiled.dsink = Tensor(dq.data(), DType::bf16, {4});
  refused(spoiled, "dsink has type bfloat16; it needs the type of sink, float32");
  spoiled.dsink.dtype = DType::f32;
  spoiled.dsink.stride[0] = 0;
  refused(spoiled, "dsink is an output but dimension 0 is expanded");
  spoiled.dsink = Tensor();
  spoiled.dbias = Tensor(dq.data(), DType::f32, {1, 1, 5, 7});
  refused(spoiled, "dbias is wanted, but there is no bias");
  attention_backward(args);
}

}  // namespace
}  // namespace anymask
