#include "cuda/backward_split.h"

#include <algorithm>
#include <cstring>

#include "cuda/backward_variants.h"
#include "cuda/device/sm90/backward_split_params.h"
#include "cuda/views.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kSplit{"backward_split",
                              "cuda/device/sm90/backward_split.h",
                              "anymask::cuda::SplitConfig",
                              "anymask::cuda::SplitParams",
                              "anymask::cuda::backward_split_kernel",
                              90,
                              true,
                              static_cast<int>(sizeof(SplitParams))};

// `main`: the variant that makes all gradients.
constexpr SplitConfig variant(const BackwardConfig& main, MaskPath row_masks) {
  SplitConfig c{};
  c.half = main.half;
  c.depth = main.depth;
  c.value_depth = main.value_depth;
  c.key_masks = main.mask_path;
  c.row_masks = static_cast<int32_t>(row_masks);
  c.key_bit_slots = main.masks() == MaskPath::kRuns ? 2 : 3;
  c.row_bit_slots = 2;
  c.math_registers = 224;
  c.load_registers = 56;
  return c;
}

constexpr bool variants_fit() {
  for (const int depth : {64, 128}) {
    for (const int value_depth : {64, 128}) {
      for (const MaskPath masks : {MaskPath::kRuns, MaskPath::kMachine}) {
        BackwardConfig main{};
        main.depth = depth;
        main.value_depth = value_depth;
        main.mask_path = static_cast<int32_t>(masks);
        if (variant(main, masks).shared_bytes() > kBlockSharedBytes) return false;
      }
    }
  }
  return true;
}
static_assert(variants_fit());

KernelConfig kernel_config(const BackwardConfig& main, MaskPath row_masks) {
  const SplitConfig c = variant(main, row_masks);
  KernelConfig config;
  config.family = &kSplit;
  config.count = sizeof(SplitConfig) / sizeof(int32_t);
  std::memcpy(config.values.data(), &c, sizeof(c));
  config.threads = c.threads();
  config.shared_bytes = c.shared_bytes();
  return config;
}
static_assert(sizeof(SplitConfig) <= kMaxConfigValues * sizeof(int32_t));

// Of 128 rows or keys, whatever there are more of.
int64_t tiles_of(const Problem& problem) {
  return (std::max(problem.q_len, problem.kv_len) + 127) / 128;
}

// Whether later keys are hidden from more rows (the last key from half of them), and no window
// hides early keys from late rows: then a tile that has many keys to meet as rows has few rows to
// meet as keys, unless there are many more of one than of the other.
bool is_causal(const rules::Program& program, const Problem& problem) {
  const RunRecipe recipe = recipe_of(program);
  return recipe.usable != 0 && program.key_order == nullptr &&
         problem.kv_len - 1 - recipe.band_hi >= problem.q_len / 2 &&
         -recipe.band_lo >= problem.q_len - 1 && problem.kv_len <= 2 * problem.q_len &&
         problem.q_len <= 2 * problem.kv_len;
}

}  // namespace

SplitUse split_use(const rules::Program& program, const Problem& problem,
                   const BackwardConfig& config, const Gpu& gpu) {
  if (config.wide != 0 || config.features != 0 || config.baked()) return SplitUse::kNever;
  if (problem.q_len == 0 || problem.kv_len == 0) return SplitUse::kNever;
  // Up to two items for each multiprocessor a causal call waits for its heaviest key tiles, while
  // here items are about equal. And there are no other launches (14 us). Chains of few items wait
  // for each other longer (8 heads of 2048 rows 120 us instead of 74, of 8192 943 instead of 739).
  // At head dimension 64 products are short: up to 14% slower, in order or not.
  const int64_t most = (config.chained == kOrdered ? 4 : 2) * gpu.multiprocessors;
  const bool few = problem.batch * problem.kv_heads * tiles_of(problem) <= most;
  const bool wide = std::max(config.depth, config.value_depth) > 64;
  if (few && wide && config.adds_keys == 0 && is_causal(program, problem)) return SplitUse::kAlone;
  // One more launch is lost on a call that does not fill the device a few times.
  constexpr int64_t kLeastRows = 1 << 16;
  const int64_t rows = problem.batch * problem.q_heads * problem.q_len;
  return rows >= kLeastRows ? SplitUse::kByPlan : SplitUse::kNever;
}

SplitChoice split_choice(const BackwardCall& call, const BackwardConfig& config,
                         const Chunks& chunks) {
  const plan::TileMap& map = call.columns;
  const int64_t places = int64_t{call.program->batches} * call.program->heads;
  const int64_t key_tiles = places * map.outer_tiles;
  const int64_t group = call.q.shape[2] / call.k.shape[2];
  // Row tiles that a key tile meets, in the mean. On an H100 S = 1024 takes 1.33 to 1.38 times as
  // long unsplit where it is 4 to 5, causal (9) 1.13; from 13 on unsplit is faster.
  constexpr int64_t kMostTiles = 12;
  int64_t most = key_tiles * kMostTiles;
  // The query heads of a group are one after the other in an item, and unless a mask is nearly full
  // blocks are at different ones. Where all their rows do not fit L2 unsplit is slower up to a
  // share of the tiles (32/8 heads, S = 2048: causal 280 instead of 393 TFLOP/s, prefix_lm, 0.64,
  // 346 and 389, full 506 and 429), else up to some more of them (16/8: causal 358 and 421 at 2048,
  // 421 and 420 at 4096).
  if (group > 1 && config.adds_keys == 0) {
    constexpr int64_t kMostGroupTiles = 17;
    int64_t of_group = key_tiles * map.inner_tiles * 3 / 4;
    if (chunks.blocks_fit) of_group = std::min(of_group, key_tiles * kMostGroupTiles);
    most = std::max(most, of_group);
  }
  return {map.total, most};
}

KernelConfig backward_split_kernel(const BackwardCall& call, const BackwardConfig& config) {
  return kernel_config(config, mask_path(recipe_of(*call.program), call.rows));
}

void backward_split(const BackwardCall& call, const Problem& problem, const BackwardParams& params,
                    const BackwardConfig& config, int ordinal, CuStream stream) {
  const Kernel& compiled = kernel(backward_split_kernel(call, config), ordinal);
  const Gpu& device = gpu(ordinal);
  SplitParams both{params, {}, {}, 0, 0, 0};
  both.q_grad_map = tensor_map(call.dq, kGradRows);

  both.tiles = static_cast<int32_t>(tiles_of(problem));
  BackwardParams& keys = both.keys;
  keys.pairs = params.batch * params.kv_heads;
  // As many pairs side by side as have what is read of them in two fifths of L2.
  const int64_t rows_and_keys = int64_t{params.q_len} * params.group_heads + params.kv_len;
  const int64_t bytes = rows_and_keys * (params.depth + params.value_depth) * 2;
  keys.chunk =
      static_cast<int32_t>(std::clamp<int64_t>(device.l2_bytes * 2 / 5 / bytes, 1, keys.pairs));
  keys.tail = keys.chunk + (keys.pairs - keys.chunk) % keys.chunk;
  keys.items = keys.pairs * both.tiles;

  // For statistics: with 9 blocks of 132 a window of 128 keys, which has the shortest items, took
  // 2% less time than with 12 and 4% less than with 22.
  constexpr int kStatsShare = 15;
  both.stats_blocks = (device.multiprocessors + kStatsShare - 1) / kStatsShare;
  // Those of the first chunk, and of as many items as there are blocks.
  const int early_pairs =
      std::min(keys.pairs, keys.chunk + device.multiprocessors / both.tiles + 1);
  both.early_row_tiles = early_pairs * params.group_heads * params.row_tiles;

  ForwardParams& rows = both.rows;
  rows.k = tensor_map(call.k, kBackwardRows);
  rows.v = tensor_map(call.v, kBackwardRows);
  rows.recipe = params.recipe;
  rows.scale_log2 = params.scale_log2;
  rows.q_heads = params.q_heads;
  rows.group_heads = params.group_heads;
  rows.q_len = params.q_len;
  rows.kv_len = params.kv_len;
  rows.program = params.program;
  rows.map = call.rows;
  const int blocks = std::min(device.multiprocessors, keys.items + both.stats_blocks);
  launch(compiled, {static_cast<uint32_t>(blocks)}, stream, both);
}

std::vector<KernelConfig> backward_split_kernels(const BackwardConfig& main) {
  // Masked runs of rows inside a column's are runs still where dK and dV are made.
  if (main.masks() != MaskPath::kRuns) return {kernel_config(main, main.masks())};
  return {kernel_config(main, MaskPath::kRuns), kernel_config(main, MaskPath::kRecipe)};
}

}  // namespace anymask::cuda
