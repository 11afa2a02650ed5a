// Attention in C++: two documents packed into one sequence, causal inside each, forward and
// backward, four query heads that share two key heads. Checks itself against a plain loop.
//
// Built against an installed anymask:
//   c++ -std=c++20 -O2 attention.cpp -lanymask -o attention && ./attention
#include <anymask/anymask.hpp>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr int kLength = 192, kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 32;
constexpr int kFirstDocument = 80;  // rows 0..79; the second document takes the rest

using Values = std::vector<float>;

Values random_values(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Values values(count);
  for (float& value : values) value = normal(random);
  return values;
}

bool may_see(int row, int column) {
  return column <= row && (row < kFirstDocument) == (column < kFirstDocument);
}

// sum(out * dout) of attention as a plain loop in double, and out itself if wanted.
double plain_attention(const Values& q, const Values& k, const Values& v, const Values& dout,
                       Values* out) {
  double total = 0;
  for (int head = 0; head < kQueryHeads; ++head) {
    const int key_head = head / (kQueryHeads / kKeyHeads);
    for (int row = 0; row < kLength; ++row) {
      const size_t at = static_cast<size_t>(row * kQueryHeads + head) * kHeadDim;
      double weights = 0;
      double sums[kHeadDim] = {};
      for (int column = 0; column < kLength; ++column) {
        if (!may_see(row, column)) continue;
        const size_t other = static_cast<size_t>(column * kKeyHeads + key_head) * kHeadDim;
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) score += double(q[at + d]) * k[other + d];
        const double weight = std::exp(score / std::sqrt(double(kHeadDim)));
        weights += weight;
        for (int d = 0; d < kHeadDim; ++d) sums[d] += weight * v[other + d];
      }
      for (int d = 0; d < kHeadDim; ++d) {
        total += sums[d] / weights * dout[at + d];
        if (out != nullptr) (*out)[at + d] = static_cast<float>(sums[d] / weights);
      }
    }
  }
  return total;
}

// How the loss moves when `values` move along `direction`: by differences of the plain loop.
template <typename Loss>
double slope(Values& values, const Values& direction, Loss loss) {
  constexpr float kStep = 1e-2f;
  const Values start = values;
  const auto moved = [&](float step) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = start[i] + step * direction[i];
    return loss();
  };
  const double result = (moved(kStep) - moved(-kStep)) / (2 * kStep);
  values = start;
  return result;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * b[i];
  return sum;
}

bool check(const char* what, double got, double expected, double tolerance) {
  const bool right = std::abs(got - expected) <= tolerance;
  std::printf("%-38s %12.6f  expected %12.6f  %s\n", what, got, expected, right ? "ok" : "WRONG");
  return right;
}

}  // namespace

int main() try {
  using anymask::DType;
  std::mt19937 random(1);
  const size_t q_size = kLength * kQueryHeads * kHeadDim, k_size = kLength * kKeyHeads * kHeadDim;
  Values q = random_values(q_size, random), k = random_values(k_size, random);
  Values v = random_values(k_size, random), dout = random_values(q_size, random);
  Values out(q_size), lse(kQueryHeads * kLength), dq(q_size), dk(k_size), dv(k_size);

  // Views of the caller's memory: [batch, length, heads, head_dim]; lse is [batch, heads, length].
  const auto query_view = [](Values& values) {
    return anymask::Tensor(values.data(), DType::f32, {1, kLength, kQueryHeads, kHeadDim});
  };
  const auto key_view = [](Values& values) {
    return anymask::Tensor(values.data(), DType::f32, {1, kLength, kKeyHeads, kHeadDim});
  };

  // The mask: what a query may see. It holds a view of `lengths`, which must outlive it.
  std::vector<int32_t> lengths = {0, kFirstDocument, kLength};  // cumulative
  const anymask::Tensor lengths_view(lengths.data(), DType::i32, {3});
  const anymask::Mask mask = anymask::causal() & anymask::cumulative_documents(lengths_view);

  anymask::ForwardArgs forward;
  forward.q = query_view(q);
  forward.k = key_view(k);
  forward.v = key_view(v);
  forward.out = query_view(out);
  forward.lse = anymask::Tensor(lse.data(), DType::f32, {1, kQueryHeads, kLength});
  forward.mask = mask;
  anymask::attention_forward(forward);

  anymask::BackwardArgs backward;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.out = forward.out;
  backward.lse = forward.lse;
  backward.dout = query_view(dout);
  backward.dq = query_view(dq);
  backward.dk = key_view(dk);
  backward.dv = key_view(dv);
  backward.mask = mask;
  anymask::attention_backward(backward);

  Values expected(q_size);
  plain_attention(q, k, v, dout, &expected);
  double largest = 0;
  for (size_t i = 0; i < q_size; ++i) {
    largest = std::max(largest, std::abs(double(out[i]) - expected[i]));
  }
  const auto loss = [&] { return plain_attention(q, k, v, dout, nullptr); };
  bool right = check("out: largest difference", largest, 0, 1e-5);
  const Values q_way = random_values(q_size, random), k_way = random_values(k_size, random);
  right &= check("dq: slope along a random direction", dot(dq, q_way), slope(q, q_way, loss), 2e-2);
  right &= check("dk: slope along a random direction", dot(dk, k_way), slope(k, k_way, loss), 2e-2);
  right &= check("dv: slope along a random direction", dot(dv, k_way), slope(v, k_way, loss), 2e-2);
  return right ? 0 : 1;
} catch (const anymask::Error& error) {
  std::fprintf(stderr, "anymask: %s\n", error.what());
  return 1;
}
