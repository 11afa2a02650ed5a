#include "cuda/backward.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "anymask/error.hpp"
#include "cuda/backward_split.h"
#include "cuda/backward_variants.h"
#include "cuda/backward_work.h"
#include "cuda/views.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily family(const char* name, const char* header, const char* function,
                              bool matrix) {
  return {name,
          header,
          "anymask::cuda::BackwardConfig",
          "anymask::cuda::BackwardParams",
          function,
          90,
          matrix,
          static_cast<int>(sizeof(BackwardParams))};
}
constexpr KernelFamily kPrepare = family("backward_prepare", "cuda/device/sm90/backward_prepare.h",
                                         "anymask::cuda::backward_prepare_kernel", false);
constexpr KernelFamily kMain =
    family("backward", "cuda/device/sm90/backward.h", "anymask::cuda::backward_kernel", true);
constexpr KernelFamily kFinish = family("backward_finish", "cuda/device/sm90/backward_finish.h",
                                        "anymask::cuda::backward_finish_kernel", false);
constexpr KernelFamily kKeyFinish =
    family("backward_key_finish", "cuda/device/sm90/backward_key_sums.h",
           "anymask::cuda::backward_key_finish_kernel", false);

// ---- variants -----------------------------------------------------------------------------------

KernelConfig kernel_config(const KernelFamily& family, BackwardConfig c) {
  const bool main = &family == &kMain;
  if (!main) {  // only what the others look at, so that variants share them
    BackwardConfig few{};
    few.half = c.half;
    few.depth = c.depth;
    few.value_depth = c.value_depth;
    few.chained = c.has_turns() ? kOrdered : kUnchained;
    few.wide = c.wide;
    c = few;
  }
  KernelConfig config;
  config.family = &family;
  config.values = {c.half,      c.depth,          c.value_depth,     c.wide,           c.k_stages,
                   c.q_stages,  c.o_stages,       c.slope_slots,     c.chained,        c.bit_slots,
                   c.mask_path, c.math_registers, c.query_registers, c.load_registers, c.adds_keys,
                   c.features};
  config.count = 16;
  if (main) {
    config.threads = c.threads();
    config.shared_bytes = c.shared_bytes();
  } else if (&family == &kPrepare) {
    config.threads = kPrepareThreads;
    config.shared_bytes = prepare_shared_bytes(c.value_depth);
  } else {
    config.threads = &family == &kFinish ? 128 * c.parts() : 256;
  }
  return config;
}
static_assert(sizeof(BackwardConfig) == 16 * sizeof(int32_t));

// ---- workspace ----------------------------------------------------------------------------------

template <typename T>
T* at(void* memory, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
}

struct Workspace {
  int64_t q_sums, stats, turns;  // offsets
  int64_t counters, counter_bytes;
  int64_t k_sums, v_sums, key_sum_bytes;     // of dK and dV together
  int64_t row_numbers, key_sums, pair_sums;  // of score options
  int64_t bytes;                             // the size of all

  Workspace(const Problem& problem, const BackwardConfig& c, const ScoreGradients& gradients) {
    const int64_t row_tiles = problem.batch * problem.q_heads * row_tiles_of(problem.q_len);
    const int64_t keys = c.adds_keys == 0 ? 0
                                          : problem.batch * problem.kv_heads * c.columns() *
                                                key_tiles_of(problem.kv_len, c);
    q_sums = take(row_tiles * kBackwardRows * c.depth * 4);
    stats = take(row_tiles * kBackwardRows * kRowStats * 2);
    turns = take(c.has_turns() ? row_tiles * 4 : 0);
    counter_bytes = (1 + kPairTiles + problem.batch * problem.kv_heads) * 4;
    counters = take(counter_bytes);
    k_sums = take(keys * c.depth * 4);
    v_sums = take(keys * c.value_depth * 4);
    key_sum_bytes = keys * (c.depth + c.value_depth) * 4;
    row_numbers = take(gradients.row_numbers() ? row_tiles * kBackwardRows * 8 : 0);
    key_sums = take(gradients.key_bytes());
    pair_sums = take(gradients.pair_bytes());
    bytes = used_;
  }

  void place(BackwardParams& params, void* memory) const {
    params.q_sums = at<float>(memory, q_sums);
    params.stats = at<uint16_t>(memory, stats);
    params.turns = at<int32_t>(memory, turns);
    params.next_item = at<int32_t>(memory, counters);
    params.known = params.next_item + 1;
    params.k_sums = at<float>(memory, k_sums);
    params.v_sums = at<float>(memory, v_sums);
    params.row_numbers = at<float>(memory, row_numbers);
    params.key_sums = at<float>(memory, key_sums);
  }

 private:
  int64_t take(int64_t size) {
    const int64_t offset = used_;
    used_ += (size + 255) / 256 * 256;
    return offset;
  }
  int64_t used_ = 0;
};

// ---- parameters ---------------------------------------------------------------------------------

void set_strides(const Tensor& tensor, int64_t& batch, int64_t& row, int64_t& head) {
  batch = tensor.stride[0];
  row = tensor.stride[1];
  head = tensor.stride[2];
}

int32_t checked_count(int64_t count, const char* what) {
  if (count > INT32_MAX) {
    throw Unsupported("attention: " + std::to_string(count) + " " + what +
                      " are too many for one call: split the batch");
  }
  return static_cast<int32_t>(count);
}

BackwardParams params_of(const BackwardCall& call, const Problem& problem,
                         const BackwardConfig& config) {
  BackwardParams params{};
  params.q = tensor_map(call.q, kBackwardRows);
  params.k = tensor_map(call.k, config.columns());
  params.v = tensor_map(call.v, config.columns());
  params.out_grad = tensor_map(call.dout, kBackwardRows);
  params.k_grad_map = tensor_map(call.dk, kGradRows);
  params.v_grad_map = tensor_map(call.dv, kGradRows);
  params.out = call.out.data;
  set_strides(call.out, params.out_batch_stride, params.out_row_stride, params.out_head_stride);
  params.grad = call.dout.data;
  set_strides(call.dout, params.grad_batch_stride, params.grad_row_stride, params.grad_head_stride);
  params.lse = static_cast<const float*>(call.lse.data);
  params.lse_grad = static_cast<const float*>(call.dlse.data);
  params.q_grad = call.dq.data;
  set_strides(call.dq, params.q_grad_batch_stride, params.q_grad_row_stride,
              params.q_grad_head_stride);
  params.k_grad = call.dk.data;
  set_strides(call.dk, params.k_grad_batch_stride, params.k_grad_row_stride,
              params.k_grad_head_stride);
  params.v_grad = call.dv.data;
  set_strides(call.dv, params.v_grad_batch_stride, params.v_grad_row_stride,
              params.v_grad_head_stride);
  params.batch = static_cast<int32_t>(problem.batch);
  params.q_heads = static_cast<int32_t>(problem.q_heads);
  params.kv_heads = static_cast<int32_t>(problem.kv_heads);
  params.group_heads = static_cast<int32_t>(problem.q_heads / problem.kv_heads);
  params.q_len = static_cast<int32_t>(problem.q_len);
  params.kv_len = static_cast<int32_t>(problem.kv_len);
  params.depth = static_cast<int32_t>(problem.head_dim);
  params.value_depth = static_cast<int32_t>(problem.v_head_dim);
  constexpr double kLog2E = 1.4426950408889634;
  params.scale = static_cast<float>(call.scale);
  // S loses lse / scale, so the scale in there must not be 0: one that leaves nothing of any score
  // takes its place. Units of lse's parts: fp16's range then holds every |lse| below 4 million.
  // (A softcap's tanh is that times the cap; it loses nothing, but rows have their parts.)
  constexpr double kLeastScale = 1.0 / (1 << 22);
  const double factor = call.scores->softcap > 0 ? call.scores->softcap : call.scale;
  const double scale = std::abs(factor) < kLeastScale ? std::copysign(kLeastScale, factor) : factor;
  params.scale_log2 = static_cast<float>(scale * kLog2E);
  params.lse_exponent = std::clamp(6 - std::ilogb(scale), -14, 15);
  params.row_tiles = static_cast<int32_t>(row_tiles_of(problem.q_len));
  params.segment_tiles = config.adds_keys != 0
                             ? segment_tiles(problem, call.program->key_order != nullptr)
                             : std::max(params.row_tiles, 1);
  params.segments =
      std::max(1, (params.row_tiles + params.segment_tiles - 1) / params.segment_tiles);
  params.columns = call.columns;
  params.rows = call.rows;
  params.program = *call.program;
  params.recipe = recipe_of(*call.program);
  return params;
}

}  // namespace

plan::TileShape backward_tile_shape(int64_t head_dim, int64_t v_head_dim) {
  const BackwardConfig c =
      backward_variant(head_dim, v_head_dim, false, MaskPath::kRuns, kUnchained);
  return {c.rows(), c.columns()};
}

int64_t backward_workspace(const Problem& problem, bool deterministic, const ScoreCall& scores) {
  const ScoreGradients gradients(scores, problem);
  return Workspace(problem,
                   backward_variant(problem.head_dim, problem.v_head_dim, false, MaskPath::kRuns,
                                    chained_by(problem, deterministic, gradients.features()),
                                    gradients.features(), divides_items(problem)),
                   gradients)
      .bytes;
}

void backward(const BackwardCall& call, int ordinal, CuStream stream) {
  const Problem problem = problem_of_views(call.q, call.k, call.v);
  const ScoreGradients gradients({*call.scores, call.dkey_bias, call.dbias, call.dsink}, problem,
                                 call.program->key_order != nullptr);
  if (problem.batch == 0 || problem.q_heads == 0 || problem.kv_heads == 0) {
    return gradients.write_zeros(ordinal, stream);
  }
  check_layout(call.q, "q");
  check_layout(call.k, "k");
  check_layout(call.v, "v");
  check_layout(call.out, "out");
  check_layout(call.dout, "dout");
  check_layout(call.dq, "dq");
  check_layout(call.dk, "dk");
  check_layout(call.dv, "dv");

  const bool half = call.q.dtype == DType::f16;
  const int32_t chained = chained_by(problem, call.deterministic, gradients.features());
  const MaskPath masks = backward_masks(recipe_of(*call.program), call.columns,
                                        chained != kUnchained, gradients.features());
  const BackwardConfig config =
      backward_variant(problem.head_dim, problem.v_head_dim, half, masks, chained,
                       gradients.features(), divides_items(problem));
  const int32_t tiles =
      checked_count(problem.batch * problem.q_heads * row_tiles_of(problem.q_len), "row tiles");
  const DeviceScope scope(ordinal);
  const SplitUse split = split_use(*call.program, problem, config, gpu(ordinal));

  BackwardParams params = params_of(call, problem, config);
  const Workspace layout(problem, config, gradients);
  layout.place(params, call.workspace);
  gradients.set(params, at<float>(call.workspace, layout.pair_sums), call.scale,
                call.program->key_order != nullptr);
  if (split == SplitUse::kAlone) {
    params.choice = {call.columns.total, INT64_MAX};  // whatever the plan counted
    clear(params.next_item, layout.counter_bytes, stream);
    gradients.begin(params, ordinal, stream);
    backward_split(call, problem, params, config, ordinal, stream);
    return gradients.end(params, ordinal, stream);
  }

  const bool may_split = split == SplitUse::kByPlan;
  const KernelConfig prepare_config = kernel_config(kPrepare, config);
  const KernelConfig main_config = kernel_config(kMain, config);
  const KernelConfig finish_config = kernel_config(kFinish, config);
  const KernelConfig split_config =
      may_split ? backward_split_kernel(call, config) : KernelConfig{};
  const KernelConfig key_finish_config = kernel_config(kKeyFinish, config);
  load_together(
      {&prepare_config, &main_config, config.has_turns() ? nullptr : &finish_config,
       may_split ? &split_config : nullptr, config.adds_keys != 0 ? &key_finish_config : nullptr},
      ordinal);
  const auto chunks_of = [&](int64_t pairs) {
    return Chunks(problem, config, gpu(ordinal), pairs, call.columns.outer_tiles, params.segments);
  };
  if (may_split) {
    const Chunks chunks = chunks_of(problem.batch * problem.kv_heads);
    params.choice = split_choice(call, config, chunks);
  }
  // Blocks that stay, not one for each row tile: where there is nothing to do (params.splits()),
  // those would take 11 us to say so.
  const Grid row_blocks{static_cast<uint32_t>(std::min(tiles, 8 * gpu(ordinal).multiprocessors))};
  if (tiles > 0) {
    launch(kernel(prepare_config, ordinal), row_blocks, stream, params);
  } else {
    clear(params.next_item, 4, stream);
  }
  const Kernel& main = kernel(main_config, ordinal);
  clear(params.k_sums, layout.key_sum_bytes, stream);
  gradients.begin(params, ordinal, stream);
  for (const PairRound& round : gradients.rounds()) {
    const int64_t key_tiles = call.columns.outer_tiles;
    const int64_t pairs =
        config.adds_keys != 0 ? problem.batch * problem.q_heads * params.segments : round.count;
    const Chunks chunks = chunks_of(pairs);
    params.chunk = static_cast<int32_t>(chunks.size);
    params.tail = static_cast<int32_t>(chunks.tail);
    params.near_tiles = static_cast<int32_t>(chunks.near_tiles);
    params.most_pairs = static_cast<int32_t>(chunks.most_pairs);
    params.pairs = static_cast<int32_t>(pairs);
    params.first_pair = round.first;
    params.pair_step = round.step;
    params.items = checked_count(pairs * key_tiles, "key tiles");
    if (params.items == 0) break;
    if (round.first > 0) clear(params.next_item, 4, stream);
    params.blocks = std::min(gpu(ordinal).multiprocessors, params.items);
    launch(main, {static_cast<uint32_t>(params.blocks)}, stream, params);
    if (may_split) backward_split(call, problem, params, config, ordinal, stream);
  }
  if (tiles > 0 && !config.has_turns()) {
    launch(kernel(finish_config, ordinal), row_blocks, stream, params);
  }
  if (layout.key_sum_bytes > 0) {
    const auto blocks = static_cast<uint32_t>(problem.batch * problem.kv_heads *
                                              key_tiles_of(problem.kv_len, config));
    launch(kernel(key_finish_config, ordinal), {blocks}, stream, params);
  }
  gradients.end(params, ordinal, stream);
}

std::vector<KernelConfig> backward_kernels() {
  constexpr int kShipped[][2] = {{64, 64}, {128, 128}, {256, 256}};
  // Each option by itself and the two sets that have most of them together; others are compiled
  // when they are first needed.
  constexpr int32_t kShippedFeatures[] = {kSoftcap,
                                          kKeyBias,
                                          kBias,
                                          kBias | kBiasTiles,
                                          kDropout,
                                          kSoftcap | kDropout,
                                          kSoftcap | kKeyBias | kBias};
  std::vector<KernelConfig> all;
  for (const auto& [depth, value_depth] : kShipped) {
    for (const bool half : {false, true}) {
      for (const int32_t chained : {kUnchained, kOrdered, kLoose}) {
        if (chained == kLoose && depth == 128) continue;
        for (const MaskPath masks :
             {MaskPath::kRuns, MaskPath::kRecipe, MaskPath::kMachine, MaskPath::kBaked}) {
          all.push_back(
              kernel_config(kMain, backward_variant(depth, value_depth, half, masks, chained)));
          if (chained != kUnchained || depth > 128) continue;
          all.push_back(kernel_config(
              kMain, backward_variant(depth, value_depth, half, masks, kUnchained, 0, true)));
          if (masks == MaskPath::kBaked) continue;
          const BackwardConfig main = backward_variant(depth, value_depth, half, masks, kUnchained);
          for (const KernelConfig& apart : backward_split_kernels(main)) all.push_back(apart);
        }
        if (chained == kLoose) continue;
        const BackwardConfig c =
            backward_variant(depth, value_depth, half, MaskPath::kRuns, chained);
        all.push_back(kernel_config(kPrepare, c));
        if (chained == kUnchained) all.push_back(kernel_config(kFinish, c));
        if (chained == kUnchained && depth <= 128) all.push_back(kernel_config(kKeyFinish, c));
        for (const int32_t features : kShippedFeatures) {
          if (chained == kOrdered && features == (kSoftcap | kDropout)) continue;
          if (depth > 128 && (features & kBiasTiles) != 0) continue;
          const auto variant = [&](bool divides) {
            return backward_variant(depth, value_depth, half, MaskPath::kRuns, chained, features,
                                    divides);
          };
          all.push_back(kernel_config(kMain, variant(false)));
          if (variant(true).adds_keys != 0) all.push_back(kernel_config(kMain, variant(true)));
        }
      }
    }
  }
  return all;
}

}  // namespace anymask::cuda
