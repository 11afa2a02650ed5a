#include "cuda/forward.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "anymask/error.hpp"
#include "cuda/device/sm90/forward_config.h"
#include "cuda/scores.h"
#include "cuda/views.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kForward{"forward",
                                "cuda/device/sm90/forward.h",
                                "anymask::cuda::ForwardConfig",
                                "anymask::cuda::ForwardParams",
                                "anymask::cuda::forward_kernel",
                                90,
                                true,
                                static_cast<int>(sizeof(ForwardParams))};

// ---- variants -----------------------------------------------------------------------------------

constexpr int padded(int64_t depth) {
  return depth <= 64 ? 64 : depth <= 128 ? 128 : depth <= 192 ? 192 : 256;
}

constexpr int kSharedBytes = 227 * 1024;  // of a block
constexpr int kHalvesRows = 16;           // up to which a call is for ForwardConfig::halves

// What a plan knows of a call, and all that decides a variant's tile.
struct Shape {
  int depth, value_depth;  // padded
  bool few_rows;
  bool halves = false;  // the same tile for a single strip of 16 rows
};

Shape shape_of(const Problem& problem) {
  return {padded(problem.head_dim), padded(problem.v_head_dim), has_few_rows(problem)};
}

// What the measurements in docs/kernels/forward.md chose. Output and scores of a math warpgroup
// must fit its registers: up to 128 output columns leave room for three warpgroups, which share
// each tile of K and V; wider outputs for two, whose products then overlap their own softmax. Few
// rows are for two as well: more of the multiprocessors then have some.
constexpr ForwardConfig variant(Shape shape, bool half = false, MaskPath masks = MaskPath::kRuns,
                                int32_t features = 0) {
  const auto [depth, value_depth, few_rows, halves] = shape;
  const bool narrow = value_depth <= 128 && depth <= 192;
  ForwardConfig c{};
  c.half = half;
  c.depth = depth;
  c.value_depth = value_depth;
  c.mask_path = static_cast<int32_t>(masks);
  c.k_stages = 2;
  c.v_stages = narrow && depth <= 128 ? 3 : 2;
  c.bit_slots = 3;
  c.pieces = 2;
  if (narrow && !few_rows) {
    c.warpgroups = 3;
    c.columns = 128;
    c.math_registers = 160;
    c.load_registers = 32;
    if (depth == 192) {
      c.columns = 96;
      c.pieces = 3;
    } else if (depth == 64 && value_depth == 64) {
      c.columns = 192;
      c.k_stages = 3;
      c.pieces = 3;
    }
  } else {
    c.warpgroups = 2;
    c.overlap = 1;
    c.columns = narrow ? 128 : depth + value_depth > 384 ? 80 : 96;
    c.bit_slots = depth + value_depth == 512 ? 1 : 3;
    c.math_registers = 232;
    c.load_registers = 40;
    c.cuts = narrow;
    c.halves = narrow && halves;
    if (c.halves != 0) {
      c.math_registers = 224;  // with half of the scores they need no more
      c.load_registers = 56;
    }
  }
  // What score options need of shared memory comes off the slots of bits, then off V.
  c.features = features;
  while (c.shared_bytes() > kSharedBytes && c.bit_slots > 1) --c.bit_slots;
  while (c.shared_bytes() > kSharedBytes && c.v_stages > 1) --c.v_stages;
  return c;
}

constexpr int kDepths[] = {64, 128, 192, 256};

constexpr bool fits(Shape shape) {
  const ForwardConfig c = variant(shape);
  const int32_t all = kSoftcap | kKeyBias | kBias | kDropout;
  // Registers are dealt out at launch, in eights a thread; trading cannot make more of them.
  const int at_launch = 65536 / c.threads() / 8 * 8 * (c.warpgroups + 1);
  return c.shared_bytes() <= kSharedBytes &&
         variant(shape, false, MaskPath::kRuns, all).shared_bytes() <= kSharedBytes &&
         c.warpgroups * c.math_registers + c.load_registers <= at_launch;
}

constexpr bool variants_fit() {
  for (const int depth : kDepths) {
    for (const int value_depth : kDepths) {
      for (const Shape& kind : {Shape{0, 0, false}, Shape{0, 0, true}, Shape{0, 0, true, true}}) {
        if (!fits({depth, value_depth, kind.few_rows, kind.halves})) return false;
      }
    }
  }
  return true;
}
static_assert(variants_fit());

KernelConfig kernel_config(const ForwardConfig& c) {
  KernelConfig config;
  config.family = &kForward;
  config.values = {c.half,      c.depth,          c.value_depth,    c.warpgroups, c.columns,
                   c.k_stages,  c.v_stages,       c.bit_slots,      c.overlap,    c.pieces,
                   c.mask_path, c.math_registers, c.load_registers, c.features,   c.gradient,
                   c.cuts,      c.halves};
  config.count = 17;
  config.threads = c.threads();
  config.shared_bytes = c.shared_bytes();
  return config;
}
static_assert(sizeof(ForwardConfig) == 17 * sizeof(int32_t));

// ---- parameters ---------------------------------------------------------------------------------

// How many (batch, head) pairs run together: as many as have their K and V in two fifths of L2,
// which leaves room for Q and the output that stream through.
int32_t chunk_of(const Problem& problem, int64_t l2_bytes) {
  const int64_t bytes =
      std::max<int64_t>(1, problem.kv_len * (problem.head_dim + problem.v_head_dim) * 2);
  const int64_t kv_heads = std::max<int64_t>(1, l2_bytes * 2 / 5 / bytes);
  const int64_t pairs = problem.batch * problem.q_heads;
  return static_cast<int32_t>(std::min(pairs, kv_heads * (problem.q_heads / problem.kv_heads)));
}

// ---- one query row ------------------------------------------------------------------------------

// Then the query heads of a group are as rows of one head, so that keys are read once for all of
// them.
Problem packed(Problem problem) {
  problem.q_len = problem.q_heads / std::max<int64_t>(1, problem.kv_heads);
  problem.q_heads = problem.kv_heads;
  return problem;
}

// q or out, likewise.
Tensor packed(Tensor tensor, int64_t kv_heads) {
  tensor.shape[1] = tensor.shape[2] / kv_heads;
  tensor.stride[1] = tensor.stride[2];
  tensor.shape[2] = kv_heads;
  tensor.stride[2] *= tensor.shape[1];
  return tensor;
}

// Unless something tells the heads of a group apart, or bits are not made of columns' runs, of
// which all rows can be given those of the one.
bool packs(const ForwardCall& call, const Problem& problem, const ForwardConfig& config,
           const RunRecipe& recipe) {
  return config.cuts != 0 && problem.q_len == 1 && problem.q_heads > problem.kv_heads &&
         problem.q_heads / problem.kv_heads <= config.rows() &&
         problem.kv_heads % call.program->heads == 0 &&
         (config.features & ~(kSoftcap | kBounded)) == 0 && call.scores->sink.data == nullptr &&
         recipe.usable != 0 && recipe.bits < 0 && recipe.ids < 0 && !config.baked();
}

// ---- few rows -----------------------------------------------------------------------------------

int64_t items_of(const Problem& problem) {
  constexpr int64_t kFewRows = 128;
  return problem.batch * problem.q_heads * ((problem.q_len + kFewRows - 1) / kFewRows);
}

// ---- workspace ----------------------------------------------------------------------------------

struct Workspace {
  int64_t arrived = 256;  // offsets; at 0 is the counter of items
  int64_t arrived_bytes = 0;
  int64_t parts = 256;
  int64_t part_floats = 0;
  int64_t bytes = 256;

  // Whether row tiles may be cut is decided before it is known what they see. Just that costs 2 us
  // (8 heads of 2048 rows under causal_document: 19 -> 21), so not where there can be little to
  // gain: where row tiles are short, or there is a block for nearly each and the mask shows all.
  Workspace(const Problem& problem, const rules::Program& program) {
    constexpr int64_t kFewKeys = 1024;
    const ForwardConfig c = variant(shape_of(problem));
    const int64_t items = items_of(problem.q_len == 1 ? packed(problem) : problem);
    const int64_t few_keys = 2 * items > kMultiprocessors ? 2 * kFewKeys : kFewKeys;
    if (c.cuts == 0 || problem.kv_len <= few_keys) return;
    const bool shows_all = program.count == 1 && program.nodes[0].op == rules::Op::kConstant &&
                           program.nodes[0].flag != 0;
    if (shows_all && 4 * items > 3 * kMultiprocessors && items <= kMultiprocessors) return;
    const int64_t rows = problem.q_len == 1 ? packed(problem).q_len : problem.q_len;
    const int64_t strips = (std::min<int64_t>(rows, c.rows()) + 15) / 16;
    arrived_bytes = std::max(kMostCutRowTiles * (c.rows() / 16), kMostCutStrips) * 4;
    parts = (arrived + arrived_bytes + 255) / 256 * 256;
    part_floats = strips * 32 * (c.value_depth / 2 + 4);
    bytes = parts + 2 * kMultiprocessors * part_floats * 4;
  }

  // Whether the row tiles of a call are cut that has so many.
  bool cuts(const ForwardConfig& config, int64_t items) const {
    return part_floats > 0 && items <= config.most_cut();
  }
};

}  // namespace

// Up to here row tiles of 128 leave every block one item at most, and the call takes as long as its
// longest, which is done sooner than one of 192 rows: 8 heads of 2048 rows ran at 454 instead of
// 399 TFLOP/s, causal at 235 instead of 215. Beyond, a full mask's blocks would wait for second
// items: two of 128 rows take 1.75 times as long as one of 192.
//
// A single strip of rows is for them whatever the number of items: 64 x 8 kv heads of one row.
bool has_few_rows(const Problem& problem) {
  return problem.q_len <= kHalvesRows ||
         items_of(problem.q_len == 1 ? packed(problem) : problem) <= kMostCutRowTiles;
}
static_assert(kMostCutRowTiles == kMultiprocessors);

int64_t forward_workspace_bytes(const Problem& problem, const rules::Program& program) {
  return Workspace(problem, program).bytes;
}

plan::TileShape forward_tile_shape(const Problem& problem) {
  return variant(shape_of(problem)).tile();
}

void forward(const ForwardCall& call, int ordinal, CuStream stream) {
  const Problem problem = problem_of_views(call.q, call.k, call.v);
  if (problem.batch == 0 || problem.q_len == 0 || problem.q_heads == 0) return;
  check_layout(call.q, "q");
  check_layout(call.k, "k");
  check_layout(call.v, "v");
  check_layout(call.out, "out");

  ForwardParams params{};
  params.recipe = recipe_of(*call.program);
  const bool half = call.q.dtype == DType::f16;
  params.scores =
      score_params(*call.scores, problem, call.scale, call.program->key_order != nullptr);
  const int32_t features = features_of(*call.scores) |
                           (bounded_by_cap(*call.scores, half) ? kBounded : 0) |
                           (params.scores.bias_at_once == 8 ? kBiasTiles : 0);
  Shape shape = shape_of(problem);
  const MaskPath masks = mask_path(params.recipe, call.rows);
  const bool packed_heads =
      packs(call, problem, variant(shape, half, masks, features), params.recipe);
  const Problem rows = packed_heads ? packed(problem) : problem;
  shape.halves = rows.q_len <= kHalvesRows;
  const ForwardConfig config = variant(shape, half, masks, features);
  const DeviceScope scope(ordinal);
  const Kernel& compiled = kernel(kernel_config(config), ordinal);

  const Tensor q = packed_heads ? packed(call.q, problem.kv_heads) : call.q;
  const Tensor out = packed_heads ? packed(call.out, problem.kv_heads) : call.out;
  params.one_mask_row = packed_heads ? 1 : 0;

  params.q = tensor_map(q, 64);
  params.k = tensor_map(call.k, config.columns);
  params.v = tensor_map(call.v, config.columns);
  params.out = out.data;
  params.out_batch_stride = out.stride[0];
  params.out_row_stride = out.stride[1];
  params.out_head_stride = out.stride[2];
  params.lse = static_cast<float*>(call.lse.data);
  params.q_heads = static_cast<int32_t>(rows.q_heads);
  params.group_heads = static_cast<int32_t>(rows.q_heads / rows.kv_heads);
  params.q_len = static_cast<int32_t>(rows.q_len);
  params.kv_len = static_cast<int32_t>(problem.kv_len);
  params.value_depth = static_cast<int32_t>(problem.v_head_dim);
  constexpr double kLog2E = 1.4426950408889634;
  params.scale_log2 = static_cast<float>(score_factor(*call.scores, call.scale) * kLog2E);
  params.negate = call.scale < 0 && !(call.scores->softcap > 0) ? 1 : 0;
  params.pairs = static_cast<int32_t>(rows.batch * rows.q_heads);
  params.chunk = chunk_of(rows, gpu(ordinal).l2_bytes);
  const int64_t items = int64_t{params.pairs} * call.rows.outer_tiles;
  if (items > INT32_MAX) {
    throw Unsupported("attention: " + std::to_string(items) +
                      " row tiles are too many for one call: split the batch");
  }
  params.items = static_cast<int32_t>(items);
  params.map = call.rows;
  params.program = *call.program;

  const Workspace layout(problem, *call.program);
  char* const workspace = static_cast<char*>(call.workspace);
  int blocks = std::min(gpu(ordinal).multiprocessors, params.items);
  if (layout.cuts(config, items)) {
    blocks = std::min<int>(gpu(ordinal).multiprocessors, kMultiprocessors);
    params.arrived = reinterpret_cast<int32_t*>(workspace + layout.arrived);
    params.parts = reinterpret_cast<float*>(workspace + layout.parts);
    params.part_floats = static_cast<int32_t>(layout.part_floats);
    clear(params.arrived, layout.arrived_bytes, stream);
  } else if (blocks < params.items) {
    params.next_item = static_cast<int32_t*>(call.workspace);
    clear(call.workspace, 4, stream);
  }
  params.blocks = blocks;
  launch(compiled, {static_cast<uint32_t>(blocks)}, stream, params);
}

std::vector<KernelConfig> forward_kernels() {
  constexpr Shape kShipped[] = {
      {64, 64, false},   {64, 64, true},         {64, 64, true, true},  //
      {128, 128, false}, {128, 128, true},       {128, 128, true, true}, {192, 128, false},
      {192, 128, true},  {192, 128, true, true}, {192, 192, false},      {256, 256, false},
  };
  std::vector<KernelConfig> all;
  for (const Shape& shape : kShipped) {
    for (const bool half : {false, true}) {
      const auto add = [&](MaskPath masks, int32_t features = 0) {
        all.push_back(kernel_config(variant(shape, half, masks, features)));
      };
      for (const MaskPath masks :
           {MaskPath::kRuns, MaskPath::kRecipe, MaskPath::kMachine, MaskPath::kBaked}) {
        add(masks);
      }
      if (shape.depth == 192) continue;
      const int32_t softcap = half ? kSoftcap : kSoftcap | kBounded;
      for (const int32_t feature : {softcap, kKeyBias, kBias, kBias | kBiasTiles, kDropout}) {
        add(MaskPath::kRuns, feature);
      }
      // Biases of pairs come with dense masks more than with others.
      add(MaskPath::kBaked, kBias | kBiasTiles);
    }
  }
  return all;
}

}  // namespace anymask::cuda
