#include "cuda/score_gradients.h"

#include <limits>

#include "anymask/error.hpp"
#include "cuda/device/score_sums_params.h"
#include "cuda/scores.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kScoreSums{"score_sums",
                                  "cuda/device/score_sums.h",
                                  nullptr,
                                  "anymask::cuda::ScoreSumParams",
                                  "anymask::cuda::sum_scores",
                                  0,
                                  false,
                                  static_cast<int>(sizeof(ScoreSumParams))};
constexpr KernelFamily kSinkSums{"sink_sums",
                                 "cuda/device/score_sums.h",
                                 nullptr,
                                 "anymask::cuda::SinkSumParams",
                                 "anymask::cuda::sum_sinks",
                                 0,
                                 false,
                                 static_cast<int>(sizeof(SinkSumParams))};

KernelConfig config_of(const KernelFamily& family, int threads) {
  KernelConfig config;
  config.family = &family;
  config.threads = threads;
  return config;
}

NumberForm form_of(const Tensor& t) {
  return t.dtype == DType::f32   ? NumberForm::kF32
         : t.dtype == DType::f16 ? NumberForm::kF16
                                 : NumberForm::kBf16;
}

int64_t elements(const Tensor& t) {
  int64_t count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  return count;
}

// A gradient [batch, head, row, key], or without rows, from sums; `from` null: zeros.
void write_sums(const Tensor& to, const float* from, int shared_batches, int shared_heads,
                int ordinal, CuStream stream) {
  ScoreSumParams params{};
  params.from = from;
  params.to = to.data;
  params.to_batch_stride = to.stride[0];
  params.to_head_stride = to.stride[1];
  const int last = to.ndim - 1;
  params.rows = last == 3 ? to.shape[2] : 1;
  params.to_row_stride = last == 3 ? to.stride[2] : 0;
  params.keys = to.shape[last];
  params.elements = elements(to);
  params.to_heads = static_cast<int32_t>(to.shape[1]);
  params.shared_batches = shared_batches;
  params.shared_heads = shared_heads;
  params.form = form_of(to);
  const int64_t blocks = (params.elements + kSumThreads - 1) / kSumThreads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("bias: its gradient has too many elements for one call: split the batch");
  }
  launch(kernel(config_of(kScoreSums, kSumThreads), ordinal), {static_cast<uint32_t>(blocks)},
         stream, params);
}

void clear(float* sums, int64_t count, CuStream stream) {
  if (count == 0) return;
  check(driver().cuMemsetD32Async(reinterpret_cast<CuAddress>(sums), 0, static_cast<size_t>(count),
                                  stream),
        "cuMemsetD32Async");
}

// How many of `whole` share one of `size`.
int shared_by(int64_t whole, int64_t size) { return size > 0 ? static_cast<int>(whole / size) : 0; }

}  // namespace

ScoreGradients::ScoreGradients(const ScoreCall& call, const Problem& problem)
    : call_(call),
      problem_(problem),
      columns_(call.options.bias.given() && call.options.bias.shape[2] == 1) {
  features_ = features_of(call.options);
  if (columns_) features_ = (features_ & ~kBias) | kKeyBias;
  row_numbers_ = (features_ & (kSoftcap | kDropout)) != 0 || call.dsink.given();
  const Tensor& dbias = call.dbias;
  if (call.dkey_bias.given() || (dbias.given() && columns_)) {
    keys_ = problem.batch * problem.q_heads * problem.kv_len;
  }
  if (!pairs_wanted()) return;
  heads_share_ = dbias.shape[1] < problem.q_heads;
  batches_share_ = dbias.shape[0] < problem.batch;
  if ((heads_share_ || batches_share_) && dbias.dtype != DType::f32) pairs_ = elements(dbias);
}

std::vector<PairRound> ScoreGradients::rounds() const {
  const auto batch = static_cast<int32_t>(problem_.batch);
  const auto heads = static_cast<int32_t>(problem_.kv_heads);
  const int32_t pairs = batch * heads;
  std::vector<PairRound> all;
  if (heads_share_ && batches_share_) {
    for (int32_t i = 0; i < pairs; ++i) all.push_back({i, 1, 1});
  } else if (heads_share_) {
    for (int32_t i = 0; i < heads; ++i) all.push_back({i, heads, batch});
  } else if (batches_share_) {
    for (int32_t i = 0; i < batch; ++i) all.push_back({i * heads, 1, heads});
  } else {
    all.push_back({0, 1, pairs});
  }
  return all;
}

void ScoreGradients::set(BackwardParams& params, float* pair_sums, double scale,
                         bool reordered) const {
  params.scores = score_params(call_.options, problem_, scale, reordered);
  if (columns_) {
    params.column_bias = params.scores.bias;
    params.scores.bias = Numbers{nullptr, 0, 0, 0, 0, 0, 1};
  }
  if (keys_ == 0) params.key_sums = nullptr;
  if (!row_numbers_) params.row_numbers = nullptr;
  if (!pairs_wanted()) return;
  const Tensor& dbias = call_.dbias;
  Tensor to = dbias;
  if (pairs_ > 0) {
    to = Tensor(pair_sums, DType::f32,
                {dbias.shape[0], dbias.shape[1], dbias.shape[2], dbias.shape[3]}, dbias.device);
  }
  BiasGradient& gradient = params.bias_grad;
  gradient.data = to.data;
  gradient.batch_stride = to.shape[0] > 1 ? to.stride[0] : 0;
  gradient.head_stride = to.shape[1] > 1 ? to.stride[1] : 0;
  gradient.row_stride = to.stride[2];
  gradient.wide = to.dtype == DType::f32 ? 1 : 0;
}

void ScoreGradients::write_zeros(int ordinal, CuStream stream) const {
  if (call_.dkey_bias.given()) write_sums(call_.dkey_bias, nullptr, 1, 1, ordinal, stream);
  if (call_.dbias.given()) write_sums(call_.dbias, nullptr, 1, 1, ordinal, stream);
  if (const Tensor& dsink = call_.dsink; dsink.given()) {
    write_sums(Tensor(dsink.data, dsink.dtype, {1, 1, dsink.shape[0]}, dsink.device), nullptr, 1, 1,
               ordinal, stream);
  }
}

void ScoreGradients::begin(const BackwardParams& params, int ordinal, CuStream stream) const {
  if (keys_ > 0) clear(params.key_sums, keys_, stream);
  if (pairs_ > 0) {
    clear(static_cast<float*>(params.bias_grad.data), pairs_, stream);
  } else if (pairs_wanted()) {
    write_sums(call_.dbias, nullptr, 1, 1, ordinal, stream);
  }
}

void ScoreGradients::end(const BackwardParams& params, int ordinal, CuStream stream) const {
  const auto sum_keys = [&](const Tensor& to) {
    write_sums(to, params.key_sums, shared_by(problem_.batch, to.shape[0]),
               shared_by(problem_.q_heads, to.shape[1]), ordinal, stream);
  };
  if (call_.dkey_bias.given()) sum_keys(call_.dkey_bias);
  if (call_.dbias.given() && columns_) sum_keys(call_.dbias);
  if (pairs_ > 0) {
    write_sums(call_.dbias, static_cast<const float*>(params.bias_grad.data), 1, 1, ordinal,
               stream);
  }
  if (!call_.dsink.given()) return;
  SinkSumParams sinks{};
  sinks.row_numbers = params.row_numbers;
  sinks.to = call_.dsink.data;
  sinks.to_stride = call_.dsink.stride[0];
  sinks.sink = params.scores.sink;
  sinks.batch = problem_.batch;
  sinks.heads = params.q_heads;
  sinks.row_tiles = params.row_tiles;
  sinks.tile_rows = kBackwardRows;
  sinks.form = form_of(call_.dsink);
  launch(kernel(config_of(kSinkSums, kSinkThreads), ordinal),
         {static_cast<uint32_t>(problem_.q_heads)}, stream, sinks);
}

std::vector<KernelConfig> score_sum_kernels() {
  return {config_of(kScoreSums, kSumThreads), config_of(kSinkSums, kSinkThreads)};
}

}  // namespace anymask::cuda
