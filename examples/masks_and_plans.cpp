// Masks as values: joining them, looking at how they fall on tiles, planning one once and using
// the plan for every layer. Checks the results against a plain loop.
#include <anymask/anymask.hpp>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

using anymask::DType;
using anymask::Mask;
using anymask::Problem;
using anymask::Tensor;

constexpr int kLength = 512, kHeads = 2, kHeadDim = 16, kTile = 32;

// A mask and the same rule as plain code.
struct Case {
  std::string name;
  Mask mask;
  std::function<bool(int, int)> may_see;  // (row, column)
};

// One character a tile: '#' every pair allowed, '+' some, '.' none.
void draw(const Mask& mask, const Problem& problem) {
  constexpr int kTiles = kLength / kTile;
  std::vector<uint8_t> classes(kTiles * kTiles);
  anymask::mask_tile_classes(mask, problem, kTile, kTile,
                             Tensor(classes.data(), DType::u8, {1, 1, kTiles, kTiles}));
  for (int row = 0; row < kTiles; ++row) {
    std::string line = "  ";
    for (int column = 0; column < kTiles; ++column) {
      line += "?#.+"[classes[row * kTiles + column] & 3];
      line += ' ';
    }
    std::puts(line.c_str());
  }
}

// The largest difference between `out` and a plain loop over the pairs that `may_see` allows.
double largest_difference(const std::vector<float>& x, const std::vector<float>& out,
                          const std::function<bool(int, int)>& may_see) {
  double largest = 0;
  for (int head = 0; head < kHeads; ++head) {
    for (int row = 0; row < kLength; ++row) {
      const float* query = &x[(row * kHeads + head) * kHeadDim];
      double weights = 0, sums[kHeadDim] = {};
      for (int column = 0; column < kLength; ++column) {
        if (!may_see(row, column)) continue;
        const float* key = &x[(column * kHeads + head) * kHeadDim];
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) score += double(query[d]) * key[d];
        const double weight = std::exp(score / std::sqrt(double(kHeadDim)));
        weights += weight;
        for (int d = 0; d < kHeadDim; ++d) sums[d] += weight * key[d];
      }
      for (int d = 0; d < kHeadDim; ++d) {
        const double expected = weights > 0 ? sums[d] / weights : 0;  // sees nothing: 0
        const double got = out[(row * kHeads + head) * kHeadDim + d];
        largest = std::max(largest, std::abs(got - expected));
      }
    }
  }
  return largest;
}

// Attention of x with itself, twice with one plan, as two layers would use it.
double attend(const Case& c, const Problem& problem, std::vector<float>& x) {
  const anymask::Plan plan(c.mask, problem);
  std::vector<float> out(x.size()), lse(kHeads * kLength);
  anymask::ForwardArgs args;
  args.q = args.k = args.v = Tensor(x.data(), DType::f32, {1, kLength, kHeads, kHeadDim});
  args.out = Tensor(out.data(), DType::f32, {1, kLength, kHeads, kHeadDim});
  args.lse = Tensor(lse.data(), DType::f32, {1, kHeads, kLength});
  args.mask = plan.mask();
  args.plan = plan.buffer();
  args.plan_bytes = plan.bytes();
  anymask::attention_forward(args);
  const std::vector<float> first = out;
  anymask::attention_forward(args);
  if (first != out) throw anymask::RuntimeFailure("two equal calls gave different results");
  return largest_difference(x, out, c.may_see);
}

}  // namespace

int main() try {
  // Arrays belong to the caller and must outlive the masks that view them.
  std::vector<int32_t> document(kLength);
  for (int i = 0; i < kLength; ++i) document[i] = i < 150 ? 0 : i < 400 ? 1 : 2;
  // FlashMask's form: the first row that may not see a column any more, one value a key.
  std::vector<int32_t> evicted_at(kLength);
  for (int j = 0; j < kLength; ++j) evicted_at[j] = j % 3 == 0 ? kLength : j + 40;

  // One flag a key, the same for every row: a dimension of 1 is broadcast.
  std::vector<uint8_t> first_keys(kLength);
  for (int j = 0; j < 16; ++j) first_keys[j] = 1;

  const Tensor ids(document.data(), DType::i32, {kLength});
  const Tensor rows(evicted_at.data(), DType::i32, {1, 1, kLength, 1});
  const Tensor first(first_keys.data(), DType::u8, {1, kLength});
  const std::vector<Case> cases = {
      {"causal() & documents(ids)", anymask::causal() & anymask::documents(ids),
       [&](int i, int j) { return j <= i && document[i] == document[j]; }},
      {"causal() & (sliding_window(64) | dense(first_keys))",
       anymask::causal() & (anymask::sliding_window(64) | anymask::dense(first)),
       [](int i, int j) { return j <= i && (i - j <= 64 || j < 16); }},
      {"documents(ids) & ~sliding_window(24, 24)",
       anymask::documents(ids) & ~anymask::sliding_window(24, 24),
       [&](int i, int j) { return document[i] == document[j] && std::abs(i - j) > 24; }},
      {"intervals(rows, causal = true)", anymask::intervals(rows, true),
       [&](int i, int j) { return j <= i && i < evicted_at[j]; }},
  };

  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(kLength * kHeads * kHeadDim);
  for (float& value : x) value = normal(random);
  const Problem problem{.batch = 1,
                        .q_heads = kHeads,
                        .kv_heads = kHeads,
                        .q_len = kLength,
                        .kv_len = kLength,
                        .head_dim = kHeadDim,
                        .v_head_dim = kHeadDim};

  bool right = true;
  for (const Case& c : cases) {
    const auto counts = anymask::mask_statistics(c.mask, problem, kTile, kTile);
    const double difference = attend(c, problem, x);
    std::printf("%s\n", c.name.c_str());
    draw(c.mask, problem);
    std::printf(
        "  %.1f%% of the pairs; %ld of %ld tiles computed, %ld of them without a mask; "
        "largest difference %.1e\n\n",
        100.0 * double(counts.visible_pairs) / double(counts.pairs),
        long(counts.all_tiles + counts.some_tiles), long(counts.tiles), long(counts.all_tiles),
        difference);
    right &= difference < 1e-5;
  }
  return right ? 0 : 1;
} catch (const anymask::Error& error) {
  std::fprintf(stderr, "anymask: %s\n", error.what());
  return 1;
}
