#include "cuda/score_gradients.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "anymask/error.hpp"
#include "cuda/device/score_sums_params.h"
#include "cuda/scores.h"
#include "cuda/views.h"

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

constexpr KernelFamily kBiasSums{"bias_sums",
                                 "cuda/device/score_sums.h",
                                 nullptr,
                                 "anymask::cuda::BiasTileParams",
                                 "anymask::cuda::round_bias_tiles",
                                 0,
                                 false,
                                 static_cast<int>(sizeof(BiasTileParams))};

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

int64_t tiles_of(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

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

// The gradient of a shared bias of pairs from sums in tiles.
void round_tiles(const Tensor& to, const float* from, int ordinal, CuStream stream) {
  BiasTileParams params{};
  params.from = from;
  params.to = to.data;
  params.to_batch_stride = to.stride[0];
  params.to_head_stride = to.stride[1];
  params.to_row_stride = to.stride[2];
  params.rows = to.shape[2];
  params.keys = to.shape[3];
  params.to_heads = static_cast<int32_t>(to.shape[1]);
  params.form = form_of(to);
  const int64_t blocks =
      to.shape[0] * to.shape[1] * tiles_of(params.rows, kBackwardRows) * tiles_of(params.keys, 128);
  launch(kernel(config_of(kBiasSums, kSumThreads), ordinal), {static_cast<uint32_t>(blocks)},
         stream, params);
}

// [batch or 1, heads or 1, rows, keys] as the copy engine takes it: [batch, rows, heads, keys],
// with one entry where one serves all.
Tensor tiled_view(const Tensor& t) {
  Tensor view = t;
  std::swap(view.shape[1], view.shape[2]);
  std::swap(view.stride[1], view.stride[2]);
  for (const int i : {0, 2}) {
    if (view.stride[i] == 0) view.shape[i] = 1;
  }
  return view;
}

bool can_be_tiled(const Tensor& t) {
  const Tensor view = tiled_view(t);
  const bool rows_differ = view.stride[1] != 0 || view.shape[1] == 1;
  return t.dtype != DType::f32 && rows_differ && layout_problem(view) == nullptr;
}

void write_zeros_to(const Tensor& to, int ordinal, CuStream stream) {
  int64_t dense = 1;
  bool contiguous = true;
  for (int i = to.ndim - 1; i >= 0; --i) {
    contiguous &= to.shape[i] == 1 || to.stride[i] == dense;
    dense *= to.shape[i];
  }
  const int64_t bytes = dense * (to.dtype == DType::f32 ? 4 : 2);
  if (contiguous && bytes % 4 == 0) {
    clear(to.data, bytes, stream);
  } else {
    write_sums(to, nullptr, 1, 1, ordinal, stream);
  }
}

// How many of `whole` share one of `size`.
int shared_by(int64_t whole, int64_t size) { return size > 0 ? static_cast<int>(whole / size) : 0; }

}  // namespace

ScoreGradients::ScoreGradients(const ScoreCall& call, const Problem& problem, bool reordered)
    : call_(call),
      problem_(problem),
      columns_(call.options.bias.given() && call.options.bias.shape[2] == 1) {
  features_ = features_of(call.options);
  if (columns_) features_ = (features_ & ~kBias) | kKeyBias;
  if (tiles_fit(reordered)) features_ |= kBiasTiles;
  row_numbers_ = (features_ & (kSoftcap | kDropout)) != 0 || call.dsink.given();
  const Tensor& dbias = call.dbias;
  if (call.dkey_bias.given() || (dbias.given() && columns_)) {
    keys_ = problem.batch * problem.q_heads * problem.kv_len;
  }
  if (!pairs_wanted()) return;
  heads_share_ = dbias.shape[1] < problem.q_heads;
  batches_share_ = dbias.shape[0] < problem.batch;
  if ((heads_share_ || batches_share_) && dbias.dtype != DType::f32) {
    tile_sums_ = tiles_of(problem.q_len, kBackwardRows) * tiles_of(problem.kv_len, 128) *
                 int64_t{kBiasTileSums};
    pairs_ = dbias.shape[0] * dbias.shape[1] * tile_sums_;  // not fewer than elements
  }
}

bool ScoreGradients::tiles_fit(bool reordered) const {
  const bool fits_registers = (features_ & kSoftcap) == 0;
  return (features_ & kBias) != 0 && fits_registers && !reordered &&
         std::max(problem_.head_dim, problem_.v_head_dim) <= 128 &&
         can_be_tiled(call_.options.bias) && (!call_.dbias.given() || can_be_tiled(call_.dbias));
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
  const bool tiled = (features_ & kBiasTiles) != 0;
  const auto map = [](const Tensor& t) {
    return tensor_map(tiled_view(t), kBackwardRows, kBiasPieceKeys);
  };
  if (tiled) params.bias_map = map(call_.options.bias);
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
  if (!tiled) return;
  if (gradient.wide == 0) {
    params.bias_grad_map = map(dbias);
  } else {
    gradient.head_stride = to.shape[1] > 1 ? tile_sums_ : 0;
    gradient.batch_stride = to.shape[0] > 1 ? to.shape[1] * tile_sums_ : 0;
  }
}

void ScoreGradients::write_zeros(int ordinal, CuStream stream) const {
  if (call_.dkey_bias.given()) write_zeros_to(call_.dkey_bias, ordinal, stream);
  if (call_.dbias.given()) write_zeros_to(call_.dbias, ordinal, stream);
  if (const Tensor& dsink = call_.dsink; dsink.given()) {
    write_sums(Tensor(dsink.data, dsink.dtype, {1, 1, dsink.shape[0]}, dsink.device), nullptr, 1, 1,
               ordinal, stream);
  }
}

void ScoreGradients::begin(const BackwardParams& params, int ordinal, CuStream stream) const {
  clear(params.key_sums, keys_ * 4, stream);
  if (pairs_ > 0) {
    clear(params.bias_grad.data, pairs_ * 4, stream);
  } else if (pairs_wanted()) {
    write_zeros_to(call_.dbias, ordinal, stream);
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
    const auto* const sums = static_cast<const float*>(params.bias_grad.data);
    if ((features_ & kBiasTiles) != 0) {
      round_tiles(call_.dbias, sums, ordinal, stream);
    } else {
      write_sums(call_.dbias, sums, 1, 1, ordinal, stream);
    }
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
  return {config_of(kScoreSums, kSumThreads), config_of(kBiasSums, kSumThreads),
          config_of(kSinkSums, kSinkThreads)};
}

}  // namespace anymask::cuda
