// Attention and its gradients by their definitions, in plain loops: shares no code with the
// library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "anymask/anymask.hpp"

namespace anymask::testing {

struct Shape {
  int64_t batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_head_dim;
};

// May query row i of (batch, query head) see key j?
using Visible = std::function<bool(int64_t batch, int64_t head, int64_t row, int64_t key)>;

// Values of a [batch, length, heads, dim] tensor, contiguous.
using Values = std::vector<double>;

struct Inputs {
  Values q, k, v, dout, dlse;
};
struct Results {
  Values out, lse, dq, dk, dv;
};

// ---- rounding to the tested types ---------------------------------------------------------------

inline double round_to(DType dtype, double x) {
  switch (dtype) {
    case DType::f64:
      return x;
    case DType::f32:
      return static_cast<float>(x);
    default:
      break;
  }
  if (!std::isfinite(x) || x == 0) return x;
  // Mantissa bits beside the leading one, and the exponent of the smallest normal number.
  const int bits = dtype == DType::bf16 ? 7 : 10, least = dtype == DType::bf16 ? -126 : -14;
  int exponent = 0;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - 1, least) - bits);
  return std::nearbyint(x / step) * step;
}

inline void store_as(DType dtype, void* to, int64_t at, double x) {
  const float single = static_cast<float>(x);
  uint32_t bits = 0;
  std::memcpy(&bits, &single, 4);
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(to)[at] = x;
      return;
    case DType::f32:
      static_cast<float*>(to)[at] = single;
      return;
    case DType::bf16:
      static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bits >> 16);
      return;
    default:
      break;
  }
  const double size = std::fabs(x);
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  uint16_t half = 0;
  if (std::isnan(x)) {
    half = 0x7e00;
  } else if (size >= 65520) {
    half = 0x7c00;
  } else if (size < std::ldexp(1.0, -14)) {
    half = static_cast<uint16_t>(std::ldexp(size, 24));
  } else {
    int exponent = 0;
    const double fraction = std::frexp(size, &exponent);
    half = static_cast<uint16_t>(((exponent + 14) << 10) +
                                 static_cast<int>(std::ldexp(fraction, 11)) - 1024);
  }
  static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(half | sign);
}

inline double load_as(DType dtype, const void* from, int64_t at) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(from)[at];
    case DType::f32:
      return static_cast<const float*>(from)[at];
    default:
      break;
  }
  const uint16_t raw = static_cast<const uint16_t*>(from)[at];
  if (dtype == DType::bf16) {
    const uint32_t bits = static_cast<uint32_t>(raw) << 16;
    float x = 0;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (raw >> 10) & 31, mantissa = raw & 1023;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) {
    x = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                      : std::numeric_limits<double>::infinity();
  }
  return (raw & 0x8000) != 0 ? -x : x;
}

inline Values draw(DType dtype, int64_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  Values values(static_cast<size_t>(count));
  for (double& x : values) x = round_to(dtype, normal(random));
  return values;
}

// ---- the definition -----------------------------------------------------------------------------

// Sums in Real; weights and results are rounded to `dtype` (f64: not at all). dk and dv sum over
// the rows as they come.
template <class Real>
Results attention(const Shape& s, const Inputs& in, const Visible& visible, double scale_given,
                  DType dtype) {
  const Real infinity = std::numeric_limits<Real>::infinity();
  const Real scale = static_cast<Real>(scale_given);
  const int64_t group = s.q_heads / s.kv_heads;
  const auto low = [&](Real x) { return static_cast<Real>(round_to(dtype, x)); };
  std::vector<Real> dq(in.q.size()), dk(in.k.size()), dv(in.v.size());
  Results r;
  r.out.assign(in.dout.size(), 0);
  r.lse.assign(in.dlse.size(), 0);
  std::vector<Real> p(static_cast<size_t>(s.kv_len));
  std::vector<Real> out(static_cast<size_t>(s.v_head_dim));
  const auto value = [](const Values& x, int64_t at) {
    return static_cast<Real>(x[static_cast<size_t>(at)]);
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.q_heads; ++h) {
      for (int64_t i = 0; i < s.q_len; ++i) {
        const int64_t q_at = ((b * s.q_len + i) * s.q_heads + h) * s.head_dim;
        const int64_t o_at = ((b * s.q_len + i) * s.q_heads + h) * s.v_head_dim;
        const int64_t l_at = (b * s.q_heads + h) * s.q_len + i;
        const auto k_at = [&](int64_t j) {
          return ((b * s.kv_len + j) * s.kv_heads + h / group) * s.head_dim;
        };
        const auto v_at = [&](int64_t j) {
          return ((b * s.kv_len + j) * s.kv_heads + h / group) * s.v_head_dim;
        };
        Real highest = -infinity, sum = 0;
        for (int64_t j = 0; j < s.kv_len; ++j) {
          Real score = -infinity;
          if (visible(b, h, i, j)) {
            score = 0;
            for (int64_t d = 0; d < s.head_dim; ++d) {
              score += value(in.q, q_at + d) * value(in.k, k_at(j) + d);
            }
            score *= scale;
          }
          p[static_cast<size_t>(j)] = score;
          highest = std::max(highest, score);
        }
        if (highest == -infinity) {
          r.lse[static_cast<size_t>(l_at)] = -infinity;
          continue;
        }
        for (Real& x : p) sum += x = std::exp(x - highest);
        r.lse[static_cast<size_t>(l_at)] = highest + std::log(sum);
        std::fill(out.begin(), out.end(), Real{0});
        for (int64_t j = 0; j < s.kv_len; ++j) {
          const Real weight = low(p[static_cast<size_t>(j)] /= sum);
          for (int64_t d = 0; d < s.v_head_dim; ++d) {
            out[static_cast<size_t>(d)] += weight * value(in.v, v_at(j) + d);
          }
        }
        Real delta = -value(in.dlse, l_at);
        for (int64_t d = 0; d < s.v_head_dim; ++d) {
          const Real rounded = low(out[static_cast<size_t>(d)]);
          r.out[static_cast<size_t>(o_at + d)] = rounded;
          delta += rounded * value(in.dout, o_at + d);
        }
        for (int64_t j = 0; j < s.kv_len; ++j) {
          const Real weight = p[static_cast<size_t>(j)];
          if (weight == 0) continue;
          Real dp = 0;
          for (int64_t d = 0; d < s.v_head_dim; ++d) {
            dp += value(in.dout, o_at + d) * value(in.v, v_at(j) + d);
            dv[static_cast<size_t>(v_at(j) + d)] += low(weight) * value(in.dout, o_at + d);
          }
          const Real ds = low(weight * (dp - delta) * scale);
          for (int64_t d = 0; d < s.head_dim; ++d) {
            dq[static_cast<size_t>(q_at + d)] += ds * value(in.k, k_at(j) + d);
            dk[static_cast<size_t>(k_at(j) + d)] += ds * value(in.q, q_at + d);
          }
        }
      }
    }
  }
  const auto rounded = [&](const std::vector<Real>& x) {
    Values values(x.size());
    for (size_t i = 0; i < x.size(); ++i) values[i] = low(x[i]);
    return values;
  };
  r.dq = rounded(dq);
  r.dk = rounded(dk);
  r.dv = rounded(dv);
  return r;
}

}  // namespace anymask::testing
