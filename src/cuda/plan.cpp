#include "cuda/plan.h"

#include <algorithm>
#include <limits>

#include "anymask/error.hpp"
#include "cuda/device/plan_params.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kClassify = {"plan_classify",
                                    "cuda/device/plan.h",
                                    nullptr,
                                    "anymask::cuda::ClassifyParams",
                                    "anymask::cuda::classify",
                                    0,
                                    false,
                                    sizeof(ClassifyParams)};
constexpr KernelFamily kCount = {"plan_count",
                                 "cuda/device/plan.h",
                                 nullptr,
                                 "anymask::cuda::OrderParams",
                                 "anymask::cuda::count_tiles",
                                 0,
                                 false,
                                 sizeof(OrderParams)};
constexpr KernelFamily kOrder = {"plan_order",
                                 "cuda/device/plan.h",
                                 nullptr,
                                 "anymask::cuda::OrderParams",
                                 "anymask::cuda::order_tiles",
                                 0,
                                 false,
                                 sizeof(OrderParams)};
constexpr KernelFamily kPack = {"plan_pack",
                                "cuda/device/pack.h",
                                "anymask::cuda::PackConfig",
                                "anymask::cuda::PackParams",
                                "anymask::cuda::pack",
                                0,
                                false,
                                sizeof(PackParams)};

KernelConfig config_of(const KernelFamily& family, int threads, int min_blocks = 1) {
  KernelConfig config;
  config.family = &family;
  config.threads = threads;
  config.min_blocks = min_blocks;
  return config;
}

KernelConfig classify_config() { return config_of(kClassify, kClassifyThreads, 4); }
KernelConfig count_config() { return config_of(kCount, 32 * kOrderWarps); }
KernelConfig order_config() { return config_of(kOrder, 32 * kOrderWarps); }

KernelConfig pack_config(int bytes, bool quads) {
  KernelConfig config = config_of(kPack, kPackThreads);
  config.values = {bytes, quads ? 1 : 0};
  config.count = 2;
  return config;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

Grid grid_of(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("plan: too many tiles for one launch (" + std::to_string(blocks) +
                      " blocks): use fewer mask heads a call");
  }
  return {static_cast<uint32_t>(blocks)};
}

// Reading the words or elements of a dense leaf costs memory traffic, once for each span that is
// asked about; everything else is cheaper asked about in large first.
bool reads_every_pair(const rules::Program& program) {
  return std::any_of(program.nodes, program.nodes + program.count, [](const rules::Node& node) {
    return node.op == rules::Op::kBits || node.op == rules::Op::kDense;
  });
}

// A single leaf's class is exact column by column, but for ids, which are known by their range.
bool classes_are_exact(const rules::Program& program) {
  return program.count == 1 && program.nodes[0].op != rules::Op::kIds;
}

void queue_classify(const rules::Program& program, const plan::TileMap* row_map,
                    const plan::TileMap* column_map, int ordinal, CuStream stream) {
  ClassifyParams params{};
  params.program = program;
  params.shape = row_map != nullptr ? row_map->shape : column_map->shape;
  params.row_tiles = ceil_div(program.q_len, params.shape.rows);
  params.key_tiles = ceil_div(program.kv_len, params.shape.columns);
  params.row_groups = ceil_div(params.row_tiles, kClassifyRowTiles);
  params.key_groups = ceil_div(params.key_tiles, 32) * (32 / kClassifyWarps);
  params.widest_span = reads_every_pair(program) ? 1 : kClassifyRowTiles;
  params.look_at_pairs = classes_are_exact(program) ? 0 : 1;
  if (row_map != nullptr) params.row_map = *row_map;
  if (column_map != nullptr) params.column_map = *column_map;
  const int64_t blocks = int64_t{program.batches} * program.heads * params.row_groups *
                         params.key_groups;
  if (blocks == 0) return;
  launch(kernel(classify_config(), ordinal), grid_of(blocks), stream, params);
}

bool same_shape(const plan::TileMap& a, const plan::TileMap& b) {
  return a.shape.rows == b.shape.rows && a.shape.columns == b.shape.columns;
}

}  // namespace

void build_tile_maps(const rules::Program& program, std::span<const plan::TileMap> row_maps,
                     std::span<const plan::TileMap> column_maps, int ordinal, CuStream stream) {
  if (row_maps.size() + column_maps.size() > kMaxMaps) {
    throw InvalidValue("plan: at most " + std::to_string(kMaxMaps) + " tile maps at once");
  }
  const DeviceScope scope(ordinal);
  OrderParams order{};
  order.places = program.batches * program.heads;
  int64_t outer_tiles = 0;
  const auto add = [&](const plan::TileMap& map) {
    order.maps[order.map_count++] = map;
    outer_tiles += int64_t{order.places} * map.outer_tiles;
  };

  std::array<bool, kMaxMaps> done{};
  for (const plan::TileMap& row_map : row_maps) {
    const plan::TileMap* partner = nullptr;
    for (size_t i = 0; i < column_maps.size() && partner == nullptr; ++i) {
      if (done[i] || !same_shape(row_map, column_maps[i])) continue;
      partner = &column_maps[i];
      done[i] = true;
    }
    queue_classify(program, &row_map, partner, ordinal, stream);
    add(row_map);
  }
  for (size_t i = 0; i < column_maps.size(); ++i) {
    if (!done[i]) queue_classify(program, nullptr, &column_maps[i], ordinal, stream);
    add(column_maps[i]);
  }

  if (outer_tiles == 0) return;
  const Grid grid = grid_of((outer_tiles + kOrderWarps - 1) / kOrderWarps);
  launch(kernel(count_config(), ordinal), grid, stream, order);
  launch(kernel(order_config(), ordinal), grid, stream, order);
}

void pack_dense(const rules::Program& lowered, const rules::Node& dense, const rules::Node& bits,
                int ordinal, CuStream stream) {
  const plan::PackedShape shape = plan::packed_shape(lowered, dense);
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
  params.rows = from.row_stride == 0 ? 1 : lowered.q_len;
  params.columns = static_cast<int32_t>(shape.columns);
  params.word_rows = static_cast<int32_t>(shape.row_words);
  params.column_blocks = ceil_div(params.columns, kPackThreads * (quads ? 4 : 1));
  const int64_t blocks = shape.batches * shape.heads * shape.row_words * params.column_blocks;
  if (blocks == 0) return;
  const DeviceScope scope(ordinal);
  launch(kernel(pack_config(from.bytes, quads), ordinal), grid_of(blocks), stream, params);
}

void build_plan(const rules::Program& lowered, const plan::Plan& plan, int ordinal,
                CuStream stream) {
  for (int32_t i = 0; i < lowered.count; ++i) {
    const rules::Node& node = lowered.nodes[i];
    if (node.op != rules::Op::kDense) continue;
    pack_dense(lowered, node, plan.program.nodes[i], ordinal, stream);
  }
  // With one tile shape for both passes the two row maps are the same memory.
  const plan::TileMap rows[] = {plan.forward_rows, plan.backward_rows};
  const bool shared = plan.forward_rows.visible == plan.backward_rows.visible;
  build_tile_maps(plan.program, std::span(rows, shared ? 1 : 2),
                  std::span(&plan.backward_columns, 1), ordinal, stream);
}

std::vector<KernelConfig> plan_kernels() {
  std::vector<KernelConfig> kernels = {classify_config(), count_config(), order_config(),
                                       pack_config(1, true)};
  for (const int bytes : {1, 2, 4, 8}) kernels.push_back(pack_config(bytes, false));
  return kernels;
}

}  // namespace anymask::cuda
