#include "cuda/plan.h"

#include <algorithm>
#include <limits>

#include "anymask/error.hpp"

namespace anymask::cuda {
namespace {

constexpr KernelFamily family(const char* name, const char* header, const char* config,
                              const char* params, const char* function, size_t param_bytes) {
  return {name, header, config, params, function, 0, false, static_cast<int>(param_bytes)};
}

constexpr KernelFamily kPack =
    family("plan_pack", "cuda/device/pack.h", "anymask::cuda::PackConfig",
           "anymask::cuda::PackParams", "anymask::cuda::pack", sizeof(PackParams));
constexpr KernelFamily kSeeKeys =
    family("plan_see_keys", "cuda/device/key_order.h", nullptr, "anymask::cuda::KeyOrderParams",
           "anymask::cuda::see_keys", sizeof(KeyOrderParams));
constexpr KernelFamily kCollectKeys =
    family("plan_collect_keys", "cuda/device/key_order.h", nullptr, "anymask::cuda::KeyOrderParams",
           "anymask::cuda::collect_keys", sizeof(KeyOrderParams));
constexpr KernelFamily kSortKeys =
    family("plan_sort_keys", "cuda/device/key_order.h", nullptr, "anymask::cuda::KeyOrderParams",
           "anymask::cuda::sort_keys", sizeof(KeyOrderParams));
constexpr KernelFamily kHalveGroups =
    family("plan_halve_groups", "cuda/device/key_order.h", nullptr, "anymask::cuda::KeyOrderParams",
           "anymask::cuda::halve_groups", sizeof(KeyOrderParams));
constexpr KernelFamily kClassify =
    family("plan_classify", "cuda/device/plan.h", nullptr, "anymask::cuda::ClassifyParams",
           "anymask::cuda::classify", sizeof(ClassifyParams));
constexpr KernelFamily kCount =
    family("plan_count", "cuda/device/plan.h", nullptr, "anymask::cuda::OrderParams",
           "anymask::cuda::count_tiles", sizeof(OrderParams));
constexpr KernelFamily kOrder =
    family("plan_order", "cuda/device/plan.h", nullptr, "anymask::cuda::OrderParams",
           "anymask::cuda::order_tiles", sizeof(OrderParams));

constexpr KernelFamily kBake =
    family("plan_bake", "cuda/device/bake.h", nullptr, "anymask::cuda::BakeParams",
           "anymask::cuda::bake", sizeof(BakeParams));

KernelConfig config_of(const KernelFamily& kernel_family, int threads, int min_blocks = 1) {
  KernelConfig config;
  config.family = &kernel_family;
  config.threads = threads;
  config.min_blocks = min_blocks;
  return config;
}

KernelConfig pack_config(int bytes, bool quads) {
  KernelConfig config = config_of(kPack, kPackThreads);
  config.values = {bytes, quads ? 1 : 0};
  config.count = 2;
  return config;
}
KernelConfig see_keys_config() { return config_of(kSeeKeys, kSeeThreads); }
KernelConfig collect_keys_config() { return config_of(kCollectKeys, kSeeThreads); }
KernelConfig sort_keys_config() { return config_of(kSortKeys, kSortThreads); }
KernelConfig halve_groups_config() { return config_of(kHalveGroups, kSortThreads); }
// Two blocks a multiprocessor: its loads wait for each other, so warps count more than registers.
KernelConfig classify_config() { return config_of(kClassify, kClassifyThreads, 2); }
KernelConfig count_config() { return config_of(kCount, 32 * kOrderWarps); }
KernelConfig order_config() { return config_of(kOrder, 32 * kOrderWarps); }
KernelConfig bake_config() { return config_of(kBake, 32 * kBakeWarps); }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

Grid grid_of(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("plan: the mask has too many tiles for one launch (" +
                      std::to_string(blocks) + " blocks): use fewer mask heads a call");
  }
  return {static_cast<uint32_t>(blocks)};
}

// Reading the words of a dense leaf is memory traffic, once for each span that is asked about;
// every other leaf is cheaper asked about many tiles first.
bool reads_every_pair(const rules::Program& program) {
  return std::any_of(program.nodes, program.nodes + program.count, [](const rules::Node& node) {
    return node.op == rules::Op::kBits || node.op == rules::Op::kDense;
  });
}

class Steps {
 public:
  explicit Steps(const rules::Program& program) : program_(program) {
    order_.places = program.batches * program.heads;
  }

  // The words of a dense leaf, in one pass over its elements.
  void pack(const rules::Node& dense, const rules::Node& bits) {
    const plan::PackedShape shape = plan::packed_shape(program_, dense);
    const rules::Array& from = dense.columns;
    const rules::Array& to = bits.columns;
    const auto multiple_of_4 = [](const rules::Array& array) {
      return (array.batch_stride | array.head_stride | array.row_stride) % 4 == 0;
    };
    const bool quads = from.bytes == 1 && from.row_stride != 0 && from.column_stride == 1 &&
                       multiple_of_4(from) && multiple_of_4(to) &&
                       reinterpret_cast<uintptr_t>(from.data) % 4 == 0;
    PackParams params{};
    params.dense = from;
    params.words = to;
    params.sign_bits = dense.flag;
    params.heads = static_cast<int32_t>(shape.heads);
    params.rows = from.row_stride == 0 ? 1 : program_.q_len;
    params.columns = static_cast<int32_t>(shape.columns);
    params.word_rows = static_cast<int32_t>(shape.row_words);
    params.column_blocks = ceil_div(params.columns, kPackThreads * (quads ? 4 : 1));
    add(pack_config(from.bytes, quads),
        shape.batches * shape.heads * shape.row_words * params.column_blocks, params);
  }

  // The order of keys. `plan`: dense leaves packed.
  void order_keys(const plan::Plan& plan, void* scratch) {
    const rules::Program& program = plan.program;
    const int tile_columns = plan.forward_rows.shape.columns;
    KeyOrderParams params{};
    params.program = program;
    params.program.key_order = nullptr;
    params.tile_columns = tile_columns;
    params.key_blocks = ceil_div(program.kv_len, kSeeThreads);
    params.most_groups = rules::group_count(program.kv_len, tile_columns);
    const int64_t places = plan::orders(program);
    const int64_t keys = places * program.kv_len;
    params.items = static_cast<uint64_t*>(scratch);
    params.seen = reinterpret_cast<rules::KeyRows*>(params.items + 2 * keys);
    params.block_keys = reinterpret_cast<int32_t*>(params.seen + keys);
    params.seen_keys = plan.seen_keys;
    params.order = const_cast<int32_t*>(program.key_order);
    if (keys == 0) return;
    add(see_keys_config(), places * params.key_blocks, params);
    add(collect_keys_config(), places * params.key_blocks, params);
    add(sort_keys_config(), places, params);
    add(halve_groups_config(), places * params.most_groups, params);
  }

  // A row map, a column map or both of one shape, for the next classify().
  void add_maps(const rules::Program& program, const plan::TileMap* row_map,
                const plan::TileMap* column_map) {
    ClassifyPass& pass = classify_.passes[pass_count_++];
    pass.shape = row_map != nullptr ? row_map->shape : column_map->shape;
    pass.row_tiles = ceil_div(program.q_len, pass.shape.rows);
    pass.key_tiles = ceil_div(program.kv_len, pass.shape.columns);
    pass.row_groups = ceil_div(pass.row_tiles, kBlockRowTiles);
    pass.key_groups = ceil_div(pass.key_tiles, 32) * (32 / kBlockKeyTiles);
    const int64_t blocks = int64_t{order_.places} * pass.row_groups * pass.key_groups;
    pass.blocks = static_cast<int32_t>(grid_of(blocks).x);
    pass.look_at_spans = reads_every_pair(program) ? 0 : 1;
    // One more look before the others pays once there are several blocks for each multiprocessor.
    pass.look_at_block = pass.look_at_spans != 0 && blocks >= 1024 ? 1 : 0;
    for (const plan::TileMap* map : {row_map, column_map}) {
      if (map == nullptr) continue;
      (map == row_map ? pass.row_map : pass.column_map) = *map;
      order_.maps[order_.map_count++] = *map;
      outer_tiles_ += int64_t{order_.places} * map->outer_tiles;
    }
  }

  // The bitmaps of all maps. `plan`: dense leaves packed.
  void classify(const plan::Plan& plan) {
    classify_.program = plan.program;
    classify_.seen_keys = plan.seen_keys;
    int64_t blocks = 0;
    for (const ClassifyPass& pass : classify_.passes) blocks += pass.blocks;
    add(classify_config(), blocks, classify_);
  }

  // Counts and orders of all maps.
  void order() {
    const int64_t blocks = (outer_tiles_ + kOrderWarps - 1) / kOrderWarps;
    add(count_config(), blocks, order_);
    add(order_config(), blocks, order_);
  }

  // The bits of partial tiles, once these are known. `program`: dense leaves packed.
  void bake(const rules::Program& program, const plan::TileMap& rows,
            const plan::TileMap& columns) {
    const auto tiles = [&](const plan::TileMap& map) {
      return int64_t{order_.places} * map.outer_tiles * map.inner_tiles;
    };
    BakeParams params{};
    params.program = program;
    params.rows = rows;
    params.columns = columns;
    params.row_blocks = plan::strips_of(rows.shape) * plan::groups_of(rows.shape);
    params.column_blocks = ceil_div(columns.shape.columns, 32);
    params.row_tasks = tiles(rows) * params.row_blocks;
    params.column_tasks = tiles(columns) * params.column_blocks;
    add(bake_config(), (params.row_tasks + params.column_tasks + kBakeWarps - 1) / kBakeWarps,
        params);
  }

  std::vector<PlanStep> take() { return std::move(steps_); }

 private:
  template <typename Params>
  void add(const KernelConfig& config, int64_t blocks, const Params& params) {
    if (blocks > 0) steps_.push_back({config, grid_of(blocks), params});
  }

  const rules::Program& program_;
  ClassifyParams classify_{};
  int pass_count_ = 0;
  OrderParams order_{};
  int64_t outer_tiles_ = 0;
  std::vector<PlanStep> steps_;
};

}  // namespace

int64_t plan_scratch_bytes(const rules::Program& lowered) {
  if (lowered.reorder_keys == 0) return 0;
  constexpr int64_t kBytesOfKey = 2 * sizeof(uint64_t) + sizeof(rules::KeyRows);
  const int64_t block_keys = ceil_div(lowered.kv_len, kSeeThreads) * int64_t{sizeof(int32_t)};
  return plan::orders(lowered) * (lowered.kv_len * kBytesOfKey + block_keys);
}

std::vector<PlanStep> plan_steps(const rules::Program& lowered, const plan::Plan& plan,
                                 void* scratch) {
  Steps steps(lowered);
  for (int32_t i = 0; i < lowered.count; ++i) {
    const rules::Node& node = lowered.nodes[i];
    if (node.op == rules::Op::kDense) steps.pack(node, plan.program.nodes[i]);
  }
  if (plan.program.key_order != nullptr) {
    steps.order_keys(plan, scratch);
  }
  // With one tile shape for both passes the two row maps are the same memory.
  if (plan.forward_rows.visible != plan.backward_rows.visible) {
    steps.add_maps(plan.program, &plan.forward_rows, nullptr);
  }
  const bool columns = plan.backward_columns.visible != nullptr;
  steps.add_maps(plan.program, &plan.backward_rows, columns ? &plan.backward_columns : nullptr);
  steps.classify(plan);
  steps.order();
  if (plan.forward_rows.baked != nullptr) {
    steps.bake(plan.program, plan.forward_rows, plan.backward_columns);
  }
  return steps.take();
}

void build_plan(const rules::Program& lowered, const plan::Plan& plan, void* scratch, int ordinal,
                CuStream stream) {
  const DeviceScope scope(ordinal);
  for (const PlanStep& step : plan_steps(lowered, plan, scratch)) {
    const Kernel& ready = kernel(step.config, ordinal);
    std::visit([&](const auto& params) { launch(ready, step.grid, stream, params); }, step.params);
  }
}

std::vector<KernelConfig> plan_kernels() {
  std::vector<KernelConfig> kernels = {
      classify_config(),     count_config(),        order_config(),
      see_keys_config(),     collect_keys_config(), sort_keys_config(),
      halve_groups_config(), bake_config(),         pack_config(1, true)};
  for (const int bytes : {1, 2, 4, 8}) kernels.push_back(pack_config(bytes, false));
  return kernels;
}

}  // namespace anymask::cuda
