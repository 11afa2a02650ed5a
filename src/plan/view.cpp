#include "plan/view.h"

namespace anymask::plan {
namespace {

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Hands out aligned pieces of a buffer; without a buffer it only counts.
class Carver {
 public:
  explicit Carver(void* buffer) : base_(static_cast<char*>(buffer)) {}

  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    constexpr int64_t kAlignment = 256;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

TileMap carve_map(Carver& carver, const rules::Program& program, TileShape shape, bool by_rows) {
  const int32_t row_tiles = ceil_div(program.q_len, shape.rows);
  const int32_t column_tiles = ceil_div(program.kv_len, shape.columns);
  TileMap map{};
  map.shape = shape;
  map.outer_tiles = by_rows ? row_tiles : column_tiles;
  map.inner_tiles = by_rows ? column_tiles : row_tiles;
  map.words = ceil_div(map.inner_tiles, 32);
  const int64_t outer = places(program) * map.outer_tiles;
  map.visible = carver.take<uint32_t>(outer * map.words);
  map.hidden = carver.take<uint32_t>(outer * map.words);
  map.order = carver.take<int32_t>(outer);
  map.count = carver.take<int32_t>(outer);
  return map;
}

rules::Node carve_bits(Carver& carver, const rules::Program& program, const rules::Node& dense) {
  const PackedShape shape = packed_shape(program, dense);
  const int64_t per_head = shape.row_words * shape.columns;
  rules::Node bits{.op = rules::Op::kBits};
  bits.columns.data = carver.take<uint32_t>(shape.batches * shape.heads * per_head);
  bits.columns.batch_stride = shape.batches == 1 ? 0 : shape.heads * per_head;
  bits.columns.head_stride = shape.heads == 1 ? 0 : per_head;
  bits.columns.row_stride = dense.columns.row_stride == 0 ? 0 : shape.columns;
  bits.columns.column_stride = dense.columns.column_stride == 0 ? 0 : 1;
  bits.columns.bytes = 4;
  bits.columns.head_divisor = dense.columns.head_divisor;
  return bits;
}

// What the caller has brought as dense leaves; a row, column, head or batch entry that stands for
// all counts once.
int64_t dense_bytes(const rules::Program& program) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < program.count; ++i) {
    const rules::Node& node = program.nodes[i];
    if (node.op != rules::Op::kDense) continue;
    const PackedShape shape = packed_shape(program, node);
    const int64_t rows = node.columns.row_stride == 0 ? 1 : program.q_len;
    bytes += shape.batches * shape.heads * rows * shape.columns * node.columns.bytes;
  }
  return bytes;
}

// Bakes where that takes no more memory than the caller's dense leaves: two bits for a pair of each
// place, where these have a byte or more. So not for a row of keys to be ignored, which is linear,
// nor for one mask of pairs joined with others of many batch entries.
void carve_baked(Carver& carver, const rules::Program& program, TileMap& rows, TileMap& columns) {
  const auto words = [&](const TileMap& map, int of_tile) {
    return places(program) * map.outer_tiles * map.inner_tiles * of_tile;
  };
  const int64_t row_words = words(rows, row_tile_words(rows.shape));
  const int64_t column_words = words(columns, column_tile_words(columns.shape));
  const int64_t brought = dense_bytes(program);
  if (brought == 0 || (row_words + column_words) * 4 > brought) return;
  rows.baked = carver.take<uint32_t>(row_words);
  columns.baked = carver.take<uint32_t>(column_words);
}

Plan carve(Carver& carver, const rules::Program& lowered, const TileShapes& shapes) {
  Plan plan{};
  plan.program = lowered;
  plan.forward_rows = carve_map(carver, lowered, shapes.forward, true);
  const bool shared = shapes.forward.rows == shapes.backward.rows &&
                      shapes.forward.columns == shapes.backward.columns;
  plan.backward_rows =
      shared ? plan.forward_rows : carve_map(carver, lowered, shapes.backward, true);
  plan.backward_columns = carve_map(carver, lowered, shapes.backward, false);
  plan.backward_columns.total = carver.take<int64_t>(1);
  if (lowered.reorder_keys != 0) {
    plan.program.key_order = carver.take<int32_t>(orders(lowered) * lowered.kv_len);
    plan.seen_keys = carver.take<int32_t>(orders(lowered));
  }
  for (int32_t i = 0; i < lowered.count; ++i) {
    if (lowered.nodes[i].op == rules::Op::kDense) {
      plan.program.nodes[i] = carve_bits(carver, lowered, lowered.nodes[i]);
    }
  }
  if (shapes.bake != 0) carve_baked(carver, lowered, plan.forward_rows, plan.backward_columns);
  return plan;
}

}  // namespace

PackedShape packed_shape(const rules::Program& program, const rules::Node& dense_leaf) {
  const rules::Array& array = dense_leaf.columns;
  return {.batches = array.batch_stride == 0 ? 1 : program.batches,
          .heads = array.head_stride == 0 ? 1 : program.heads / array.head_divisor,
          .row_words = array.row_stride == 0 ? 1 : ceil_div(program.q_len, rules::kWordRows),
          .columns = array.column_stride == 0 ? 1 : program.kv_len};
}

Plan view(const rules::Program& lowered, const TileShapes& shapes, void* buffer) {
  Carver carver(buffer);
  return carve(carver, lowered, shapes);
}

Plan forward_only(Plan plan) {
  plan.backward_rows = plan.forward_rows;
  plan.backward_columns = {};
  return plan;
}

int64_t bytes_needed(const rules::Program& lowered, const TileShapes& shapes) {
  Carver carver(nullptr);
  carve(carver, lowered, shapes);
  return carver.used();
}

}  // namespace anymask::plan
