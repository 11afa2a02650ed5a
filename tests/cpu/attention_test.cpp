// Forward and backward of every instruction set and type against the definition.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "cpu/reference.h"

namespace anymask::testing {
namespace {

// A mask and, told independently, what it allows.
struct MaskCase {
  Mask mask;
  Visible visible;
  std::vector<int32_t> first, second;  // the mask's arrays
};

constexpr const char* kMasks[] = {"full", "causal", "window", "intervals", "ids", "scattered"};

std::unique_ptr<MaskCase> make_mask(const std::string& kind, const Shape& s, std::mt19937& random) {
  auto one = std::make_unique<MaskCase>();
  const int64_t shift = s.kv_len - s.q_len;
  const auto integer = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(random));
  };
  const auto fill = [&](std::vector<int32_t>& array, int64_t count, int64_t low, int64_t high) {
    array.resize(static_cast<size_t>(count));
    for (int32_t& x : array) x = integer(low, high);
  };
  if (kind == "causal") {
    one->mask = causal();
    one->visible = [=](int64_t, int64_t, int64_t i, int64_t j) { return j <= i + shift; };
  } else if (kind == "window") {
    const int64_t left = integer(0, 90), right = integer(0, 20);
    one->mask = sliding_window(left, right);
    one->visible = [=](int64_t, int64_t, int64_t i, int64_t j) {
      return i + shift - left <= j && j <= i + shift + right;
    };
  } else if (kind == "intervals") {
    // Two columns, not causal: hidden from the first row on, and before the second. Many rows see
    // nothing.
    fill(one->first, s.batch * s.kv_heads * s.kv_len * 2, 0, s.q_len);
    auto* rows = one->first.data();
    one->mask = intervals(Tensor(rows, DType::i32, {s.batch, s.kv_heads, s.kv_len, 2}), false);
    one->visible = [=](int64_t b, int64_t h, int64_t i, int64_t j) {
      const int64_t mask_head = h / (s.q_heads / s.kv_heads);
      const int32_t* pair = rows + ((b * s.kv_heads + mask_head) * s.kv_len + j) * 2;
      return i < pair[0] && i >= pair[1];
    };
  } else if (kind == "ids") {
    fill(one->first, s.q_heads * s.q_len, -5, 0);
    fill(one->second, s.q_heads * s.kv_len, -4, -1);  // rows of id -5 see nothing
    auto *rows = one->first.data(), *keys = one->second.data();
    one->mask = ids(Tensor(rows, DType::i32, {1, s.q_heads, s.q_len}),
                    Tensor(keys, DType::i32, {1, s.q_heads, s.kv_len}));
    one->visible = [=](int64_t, int64_t h, int64_t i, int64_t j) {
      const int32_t id = rows[h * s.q_len + i];
      return id >= 0 || id == keys[h * s.kv_len + j];
    };
  } else if (kind == "scattered") {
    // One pair in twelve: most keys of a tile are visible to few rows, some rows to none.
    fill(one->first, s.batch * s.q_len * s.kv_len, 0, 11);
    for (int32_t& x : one->first) x = x == 0;
    auto* pairs = one->first.data();
    one->mask = dense(Tensor(pairs, DType::i32, {s.batch, 1, s.q_len, s.kv_len}));
    one->visible = [=](int64_t b, int64_t, int64_t i, int64_t j) {
      return pairs[(b * s.q_len + i) * s.kv_len + j] != 0;
    };
  } else {
    one->visible = [](int64_t, int64_t, int64_t, int64_t) { return true; };
  }
  return one;
}

// Memory for a [batch, length, heads, dim] tensor; `odd`: rows an odd number of elements apart, and
// not at the beginning.
class Storage {
 public:
  Storage(DType dtype, int64_t batch, int64_t length, int64_t heads, int64_t dim, bool odd)
      : row_(dim + (odd ? 3 : 0)),
        bytes_(static_cast<size_t>((batch * length * heads * row_ + 8) * size_of(dtype)), 0xff),
        view_(bytes_.data() + (odd ? size_of(dtype) : 0), dtype, {batch, length, heads, dim}) {
    view_.stride[0] = std::max<int64_t>(length, 1) * heads * row_;
    view_.stride[1] = std::max<int64_t>(heads, 1) * row_;
    view_.stride[2] = row_;
  }
  const Tensor& view() const { return view_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  void put(const Values& values) {
    each([&](int64_t at, size_t i) { store_as(view_.dtype, view_.data, at, values[i]); });
  }
  Values get() const {
    Values values(
        static_cast<size_t>(view_.shape[0] * view_.shape[1] * view_.shape[2] * view_.shape[3]));
    each([&](int64_t at, size_t i) { values[i] = load_as(view_.dtype, view_.data, at); });
    return values;
  }

 private:
  template <class Body>
  void each(const Body& body) const {
    size_t i = 0;
    const int64_t rows = view_.shape[0] * view_.shape[1] * view_.shape[2];
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < view_.shape[3]; ++d) body(row * row_ + d, i++);
    }
  }
  int64_t row_;
  std::vector<uint8_t> bytes_;  // 0xff: NaN in every floating-point type
  Tensor view_;
};

struct Call {
  Storage q, k, v, out, dout, dq, dk, dv, lse, dlse;

  Call(const Shape& s, DType dtype, bool odd, const Inputs& in)
      : q(dtype, s.batch, s.q_len, s.q_heads, s.head_dim, odd),
        k(dtype, s.batch, s.kv_len, s.kv_heads, s.head_dim, odd),
        v(dtype, s.batch, s.kv_len, s.kv_heads, s.v_head_dim, odd),
        out(dtype, s.batch, s.q_len, s.q_heads, s.v_head_dim, odd),
        dout(dtype, s.batch, s.q_len, s.q_heads, s.v_head_dim, odd),
        dq(dtype, s.batch, s.q_len, s.q_heads, s.head_dim, odd),
        dk(dtype, s.batch, s.kv_len, s.kv_heads, s.head_dim, odd),
        dv(dtype, s.batch, s.kv_len, s.kv_heads, s.v_head_dim, odd),
        lse(sum_type(dtype), s.batch, s.q_heads, s.q_len, 1, false),
        dlse(sum_type(dtype), s.batch, s.q_heads, s.q_len, 1, false) {
    q.put(in.q);
    k.put(in.k);
    v.put(in.v);
    dout.put(in.dout);
    dlse.put(in.dlse);
  }
  void compute(const Mask& mask, double scale) {
    ForwardArgs f;
    f.q = q.view(), f.k = k.view(), f.v = v.view(), f.out = out.view(), f.lse = flat(lse);
    f.mask = mask;
    f.scale = scale;
    attention_forward(f);
    BackwardArgs g;
    g.q = f.q, g.k = f.k, g.v = f.v, g.out = f.out, g.lse = f.lse;
    g.dout = dout.view(), g.dlse = flat(dlse);
    g.dq = dq.view(), g.dk = dk.view(), g.dv = dv.view();
    g.mask = mask;
    g.scale = scale;
    attention_backward(g);
  }
  Results results() const { return {out.get(), lse.get(), dq.get(), dk.get(), dv.get()}; }

 private:
  static DType sum_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  static Tensor flat(const Storage& lse) {
    Tensor t = lse.view();
    t.ndim = 3;
    return t;
  }
};

Inputs draw_inputs(const Shape& s, DType dtype, std::mt19937& random) {
  const int64_t q_rows = s.batch * s.q_len * s.q_heads, k_rows = s.batch * s.kv_len * s.kv_heads;
  return {draw(dtype, q_rows * s.head_dim, random), draw(dtype, k_rows * s.head_dim, random),
          draw(dtype, k_rows * s.v_head_dim, random), draw(dtype, q_rows * s.v_head_dim, random),
          draw(DType::f32, q_rows, random)};
}

// The largest of |got - exact| must not exceed `times` that of the naive result plus twice that of
// rounding alone. times: 2, but 4 where there are few rows: every error of a row comes from a
// handful of roundings, and the naive result may have been lucky with all of them.
void expect_close(const char* name, const Values& got, const Values& exact, const Values& naive,
                  DType dtype, double times, double floor) {
  ASSERT_EQ(got.size(), exact.size()) << name;
  double error = 0, allowed = 0, rounding = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(std::isnan(got[i])) << name << " at " << i;
    ASSERT_EQ(std::isinf(got[i]), std::isinf(exact[i])) << name << " at " << i;
    if (std::isinf(exact[i])) continue;
    error = std::max(error, std::fabs(got[i] - exact[i]));
    allowed = std::max(allowed, std::fabs(naive[i] - exact[i]));
    const double back = round_to(dtype, round_to(dtype, round_to(dtype, exact[i]) + 0.3) - 0.3);
    rounding = std::max(rounding, std::fabs(back - exact[i]));
  }
  EXPECT_LE(error, times * allowed + 2 * rounding + floor) << name;
}

void check(const Shape& s, DType dtype, const std::string& mask_kind, bool odd, double scale,
           std::mt19937& random) {
  SCOPED_TRACE(::testing::Message()
               << "batch " << s.batch << " q_len " << s.q_len << " kv_len " << s.kv_len << " heads "
               << s.q_heads << "/" << s.kv_heads << " dims " << s.head_dim << "/" << s.v_head_dim
               << (odd ? " odd strides" : "") << " scale " << scale);
  const Inputs in = draw_inputs(s, dtype, random);
  const auto mask = make_mask(mask_kind, s, random);
  Call run(s, dtype, odd, in);
  run.compute(mask->mask, scale);
  const Results got = run.results();
  const Results exact = attention<double>(s, in, mask->visible, scale, DType::f64);
  const bool wide = dtype == DType::f64;
  const Results naive = wide ? exact : attention<float>(s, in, mask->visible, scale, dtype);
  const DType lse_type = wide ? DType::f64 : DType::f32;
  const double floor = wide ? 1e-11 : 1e-5;
  const double times = s.batch * s.q_heads * s.q_len < 1000 ? 4 : 2;
  expect_close("out", got.out, exact.out, naive.out, dtype, times, wide ? floor : 1e-6);
  expect_close("lse", got.lse, exact.lse, naive.lse, lse_type, times, floor);
  expect_close("dq", got.dq, exact.dq, naive.dq, dtype, times, floor);
  expect_close("dk", got.dk, exact.dk, naive.dk, dtype, times, floor);
  expect_close("dv", got.dv, exact.dv, naive.dv, dtype, times, floor);
}

using Parameters = std::tuple<std::string, DType, const char*>;

class CpuAttention : public ::testing::TestWithParam<Parameters> {
 protected:
  void SetUp() override { set_cpu_instruction_set(std::get<0>(GetParam())); }
  void TearDown() override {
    set_cpu_instruction_set(cpu_instruction_sets().back());
    set_cpu_threads(0);
  }
};

TEST_P(CpuAttention, AgreesWithTheDefinition) {
  const auto [isa, dtype, mask] = GetParam();
  std::mt19937 random(std::random_device{}());
  const auto pick = [&](std::initializer_list<int64_t> from) {
    return from.begin()[random() % from.size()];
  };
  for (int draws = 0; draws < 6; ++draws) {
    Shape s{};
    do {
      s.batch = pick({1, 2});
      s.kv_heads = pick({1, 2});
      s.q_heads = s.kv_heads * pick({1, 2, 3});
      s.q_len = pick({1, 7, 32, 65, 130, 257});
      s.kv_len = pick({1, 5, 64, 129, 257, s.q_len});
      s.head_dim = 8 * pick({1, 2, 3, 5, 8, 9, 16, 32});
      s.v_head_dim = pick({s.head_dim, s.head_dim, 8, 24, 64, 136});
    } while (s.batch * s.q_heads * s.q_len * s.kv_len * (s.head_dim + s.v_head_dim) > 8000000);
    set_cpu_threads(static_cast<int>(pick({1, 2, 3})));
    const double scale = draws == 0 ? -0.3 : draws == 1 ? 0.0 : 1 / std::sqrt(s.head_dim);
    check(s, dtype, mask, pick({0, 0, 1}) == 1, scale, random);
  }
}

TEST_P(CpuAttention, CrossesManyTiles) {
  const auto [isa, dtype, mask] = GetParam();
  std::mt19937 random(std::random_device{}());
  check({1, 301, 523, 2, 1, 16, 8}, dtype, mask, false, 0.25, random);
}

// As in decoding: kernels of their own, up to a number of rows that depends on the lanes. Heads of
// a group are rows where there is one query.
TEST_P(CpuAttention, FewRows) {
  const auto [isa, dtype, mask] = GetParam();
  std::mt19937 random(std::random_device{}());
  const auto pick = [&](std::initializer_list<int64_t> from) {
    return from.begin()[random() % from.size()];
  };
  for (int64_t q_len = 1; q_len <= 9; ++q_len) {
    const int64_t kv_heads = pick({1, 2});
    const int64_t group = q_len == 1 ? pick({1, 2, 3, 4, 5, 8, 9}) : pick({1, 2});
    const int64_t head_dim = 8 * pick({1, 2, 3, 5, 8, 10, 16, 32});
    const Shape s{pick({1, 2}), q_len,    pick({1, 13, 128, 300, 417}),         kv_heads * group,
                  kv_heads,     head_dim, pick({head_dim, 8, 24, 72, 136, 256})};
    set_cpu_threads(static_cast<int>(pick({1, 3})));
    const double scale = static_cast<double>(pick({-1, 1, 1})) / std::sqrt(head_dim);
    check(s, dtype, mask, pick({0, 1}) == 1, scale, random);
  }
}

TEST_P(CpuAttention, NothingToSee) {
  const auto [isa, dtype, mask] = GetParam();
  std::mt19937 random(std::random_device{}());
  check({1, 9, 0, 2, 1, 16, 8}, dtype, "full", false, 0.25, random);
  check({1, 0, 9, 2, 1, 16, 8}, dtype, "full", false, 0.25, random);
}

std::string name_of_case(const ::testing::TestParamInfo<Parameters>& info) {
  const auto& [isa, dtype, mask] = info.param;
  return isa + "_" + name_of(dtype) + "_" + mask;
}
INSTANTIATE_TEST_SUITE_P(All, CpuAttention,
                         ::testing::Combine(::testing::ValuesIn(cpu_instruction_sets()),
                                            ::testing::Values(DType::f32, DType::f16, DType::bf16,
                                                              DType::f64),
                                            ::testing::ValuesIn(kMasks)),
                         name_of_case);

// ---- the same bits, whatever the threads do -----------------------------------------------------

std::string name_of_type(const ::testing::TestParamInfo<DType>& info) {
  return name_of(info.param);
}

class CpuDeterminism : public ::testing::TestWithParam<DType> {};

TEST_P(CpuDeterminism, ThreadsDoNotChangeABit) {
  std::mt19937 random(std::random_device{}());
  for (const char* kind : {"full", "causal", "intervals"}) {
    const Shape s{2, 391, 420, 4, 2, 32, 24};
    const Inputs in = draw_inputs(s, GetParam(), random);
    const auto mask = make_mask(kind, s, random);
    std::vector<std::vector<uint8_t>> first;
    for (const int threads : {1, 2, 3, 7}) {
      set_cpu_threads(threads);
      Call run(s, GetParam(), false, in);
      run.compute(mask->mask, 0.2);
      const std::vector<std::vector<uint8_t>> bytes{run.out.bytes(), run.lse.bytes(),
                                                    run.dq.bytes(), run.dk.bytes(), run.dv.bytes()};
      if (first.empty()) first = bytes;
      EXPECT_TRUE(bytes == first) << kind << " with " << threads << " threads";
    }
  }
  set_cpu_threads(0);
}
INSTANTIATE_TEST_SUITE_P(All, CpuDeterminism,
                         ::testing::Values(DType::f32, DType::f16, DType::bf16, DType::f64),
                         name_of_type);

// ---- corners ------------------------------------------------------------------------------------

TEST(CpuCorners, NanStaysInItsRow) {
  std::mt19937 random(std::random_device{}());
  for (const int64_t q_len : {4, 40}) {
    const Shape s{1, q_len, 50, 1, 1, 16, 16};
    for (const std::string& isa : cpu_instruction_sets()) {
      set_cpu_instruction_set(isa);
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
        Inputs in = draw_inputs(s, dtype, random);
        in.q[static_cast<size_t>(2 * s.head_dim + 3)] = std::nan("");
        Call run(s, dtype, false, in);
        run.compute(full(), 0.25);
        const Values out = run.out.get();
        for (int64_t i = 0; i < s.q_len; ++i) {
          EXPECT_EQ(std::isnan(out[static_cast<size_t>(i * s.v_head_dim)]), i == 2)
              << isa << " " << name_of(dtype) << " row " << i << " of " << q_len;
        }
      }
    }
  }
}

// Scores of +-3000 and more: weights are exactly 0 or 1.
TEST(CpuCorners, LargeScores) {
  const Shape s{1, 3, 40, 1, 1, 8, 8};
  for (const std::string& isa : cpu_instruction_sets()) {
    set_cpu_instruction_set(isa);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
      Inputs in{Values(24, 100.0), Values(320, -30.0), Values(320, 2.0), Values(24, 1.0),
                Values(3, 0.0)};
      for (size_t d = 0; d < 8; ++d) in.k[17 * 8 + d] = 30, in.v[17 * 8 + d] = 5;
      Call run(s, dtype, false, in);
      run.compute(full(), 1.0);
      const Results got = run.results();
      for (const double x : got.out) EXPECT_NEAR(x, 5.0, 1e-6) << isa << " " << name_of(dtype);
      for (const double x : got.lse) EXPECT_NEAR(x, 24000.0, 1e-2) << isa << " " << name_of(dtype);
      for (const double x : got.dq) EXPECT_NEAR(x, 0.0, 1e-2) << isa << " " << name_of(dtype);
    }
  }
}

TEST(CpuCorners, PeakIsMeasured) {
  EXPECT_GT(measure_cpu_peak(DType::f32), 0.1);
  EXPECT_GT(measure_cpu_peak(DType::f64), 0.1);
}

}  // namespace
}  // namespace anymask::testing
