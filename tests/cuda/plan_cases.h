// Masks over random arrays, and the comparison of a plan with the one that the CPU backend builds:
// the same packed words, bits, counts and orders.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "cuda/arrays.h"

namespace anymask::cuda {

using rules::Array;
using rules::IntervalForm;
using rules::Node;
using rules::Op;
using rules::Program;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int end) { return std::uniform_int_distribution<int>(0, end - 1)(engine_); }

 private:
  std::mt19937 engine_;
};

// Random leaves over random arrays, for one problem.
class Masks {
 public:
  Masks(unsigned seed, int batches, int heads, int q_len, int kv_len) : random(seed) {
    program.batches = batches;
    program.heads = heads;
    program.q_len = q_len;
    program.kv_len = kv_len;
  }

  void push(const Node& node) { program.nodes[program.count++] = node; }
  void join(Op op) { push(Node{.op = op}); }

  void band(int left, int right) {
    const int offset = program.kv_len - program.q_len;
    push(Node{.op = Op::kBand, .lo = offset - left, .hi = offset + right});
  }

  void intervals(IntervalForm form, bool scattered) {
    const int n = form == IntervalForm::kFrom ? 1 : form == IntervalForm::kTwoRuns ? 4 : 2;
    std::vector<int32_t> values(static_cast<size_t>(places() * program.kv_len * n));
    int common = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (i % 97 == 0 || scattered) common = random.below(program.q_len + 40) - 20;
      values[i] = common + static_cast<int>(i) % n * random.below(scattered ? 200 : 2);
    }
    Node node{.op = Op::kIntervals, .flag = static_cast<int32_t>(form)};
    node.columns = per_place(arrays.add(values), program.kv_len * n, 4);
    node.columns.row_stride = n;
    node.columns.column_stride = 1;
    push(node);
  }

  template <typename T>
  void ids(bool sorted, bool open) {
    const auto draw = [&](int length) {
      std::vector<T> ids(static_cast<size_t>(places() * length));
      for (T& id : ids) id = static_cast<T>(random.below(6)) - 3;
      if (sorted) {
        for (int p = 0; p < places(); ++p) {
          std::sort(ids.begin() + p * length, ids.begin() + (p + 1) * length);
        }
      }
      return arrays.add(ids);
    };
    Node node{.op = Op::kIds, .flag = open ? 1 : 0};
    node.rows = per_place(draw(program.q_len), program.q_len, sizeof(T));
    node.rows.row_stride = 1;
    node.columns = per_place(draw(program.kv_len), program.kv_len, sizeof(T));
    node.columns.row_stride = 1;
    push(node);
  }

  void segments(int count) {
    std::vector<int32_t> bounds(static_cast<size_t>(count), 0);
    for (int i = 1; i < count; ++i) bounds[static_cast<size_t>(i)] = random.below(program.q_len);
    std::sort(bounds.begin(), bounds.end());
    Node node{.op = Op::kSegments, .lo = count};
    node.columns = {.data = arrays.add(bounds), .column_stride = 1, .bytes = 4};
    push(node);
  }

  void blocks(int rows, int columns) {
    const int down = (program.q_len + rows - 1) / rows;
    const int across = (program.kv_len + columns - 1) / columns;
    std::vector<uint8_t> keep(static_cast<size_t>(places() * down * across));
    for (uint8_t& entry : keep) entry = static_cast<uint8_t>(random.below(3));
    Node node{.op = Op::kBlocks, .lo = rows, .hi = columns};
    node.columns = per_place(arrays.add(keep), down * across, 1);
    node.columns.row_stride = across;
    node.columns.column_stride = 1;
    push(node);
  }

  // Runs of equal elements, so that whole tiles agree; the strides are those of `layout`:
  // 'r' rows outer, 'c' columns outer (transposed), 'p' padded rows, '-' one row, '|' one column.
  template <typename T>
  void dense(char layout, bool is_float, int run) {
    const int rows = layout == '-' ? 1 : program.q_len;
    const int columns = layout == '|' ? 1 : program.kv_len;
    const int row_pitch = columns + (layout == 'p' ? 5 : 0);
    const int size = layout == 'c' ? rows * columns : rows * row_pitch;
    std::vector<T> values(static_cast<size_t>(places() * size));
    T current = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (static_cast<int>(i) % run == 0) current = draw_element<T>(is_float);
      values[i] = current;
    }
    Node node{.op = Op::kDense, .flag = is_float ? 1 : 0};
    node.columns = per_place(arrays.add(values), size, sizeof(T));
    node.columns.row_stride = layout == '-' ? 0 : layout == 'c' ? 1 : row_pitch;
    node.columns.column_stride = layout == '|' ? 0 : layout == 'c' ? rows : 1;
    push(node);
  }

  int places() const { return program.batches * program.heads; }

  Random random;
  Program program{};
  Arrays arrays;

 private:
  // 0, the sign bit alone (a zero when it is a float), or something else.
  template <typename T>
  T draw_element(bool is_float) {
    const int draw = random.below(is_float ? 3 : 2);
    if (draw == 0) return 0;
    if (draw == 1) return static_cast<T>(T{1} << random.below(8 * int{sizeof(T)} - 1));
    return static_cast<T>(T{1} << (8 * sizeof(T) - 1));
  }

  Array per_place(const void* data, int64_t stride, size_t bytes) const {
    return {.data = data,
            .batch_stride = program.batches == 1 ? 0 : program.heads * stride,
            .head_stride = program.heads == 1 ? 0 : stride,
            .bytes = static_cast<int32_t>(bytes)};
  }
};

inline std::vector<char> cpu_plan(const Program& program, const plan::TileShapes& shapes) {
  std::vector<char> buffer(static_cast<size_t>(plan::bytes_needed(program, shapes)) + 256);
  void* aligned = buffer.data() + (256 - reinterpret_cast<uintptr_t>(buffer.data()) % 256);
  cpu::build_plan(program, plan::view(program, shapes, aligned));
  const char* first = static_cast<const char*>(aligned);
  return {first, first + plan::bytes_needed(program, shapes)};
}

// Compares a section word by word; padding between sections is nobody's.
inline void compare(const char* what, const void* section, int64_t words, const void* cpu_base,
                    const void* gpu_base, const void* layout_base) {
  const auto offset = static_cast<const char*>(section) - static_cast<const char*>(layout_base);
  const char* a = static_cast<const char*>(cpu_base) + offset;
  const char* b = static_cast<const char*>(gpu_base) + offset;
  for (int64_t i = 0; i < words; ++i) {
    uint32_t x = 0, y = 0;
    std::memcpy(&x, a + 4 * i, 4);
    std::memcpy(&y, b + 4 * i, 4);
    ASSERT_EQ(x, y) << what << ", word " << i << " of " << words;
  }
}

inline void compare_maps(const char* what, const plan::TileMap& map, int64_t places,
                         const void* cpu, const void* gpu, const void* base) {
  SCOPED_TRACE(what);
  const int64_t outer = places * map.outer_tiles;
  compare("visible", map.visible, outer * map.words, cpu, gpu, base);
  compare("hidden", map.hidden, outer * map.words, cpu, gpu, base);
  compare("count", map.count, outer, cpu, gpu, base);
  compare("order", map.order, outer, cpu, gpu, base);
}

// What a build left in the buffer of a plan, and the address that the plan was laid out for.
struct BuiltPlan {
  std::vector<char> content;
  plan::Plan plan;
  const void* base;
};

inline void expect_same_plan(const Program& host, const plan::TileShapes& shapes,
                             const BuiltPlan& built) {
  const std::vector<char> expected = cpu_plan(host, shapes);
  const int64_t places = plan::places(host);
  const auto same = [&](const char* what, const plan::TileMap& map) {
    compare_maps(what, map, places, expected.data(), built.content.data(), built.base);
  };
  for (int i = 0; i < host.count; ++i) {
    if (host.nodes[i].op != Op::kDense) continue;
    const plan::PackedShape shape = plan::packed_shape(host, host.nodes[i]);
    // Bits of rows beyond q_len may be anything: the CPU leaves them 0, and so does the GPU.
    compare("packed words", built.plan.program.nodes[i].columns.data,
            shape.batches * shape.heads * shape.row_words * shape.columns, expected.data(),
            built.content.data(), built.base);
  }
  if (host.reorder_keys != 0) {
    compare("key order", built.plan.program.key_order, places / host.order_divisor * host.kv_len,
            expected.data(), built.content.data(), built.base);
    compare("seen keys", built.plan.seen_keys, plan::orders(host), expected.data(),
            built.content.data(), built.base);
  }
  same("forward rows", built.plan.forward_rows);
  same("backward rows", built.plan.backward_rows);
  same("backward columns", built.plan.backward_columns);
  const plan::TileMap& columns = built.plan.backward_columns;
  if (columns.outer_tiles * columns.inner_tiles > 0) {
    compare("visible tiles", columns.total, 1, expected.data(), built.content.data(), built.base);
  }
}

struct Size {
  int batches, heads, q_len, kv_len;
  plan::TileShapes shapes;
};
inline const Size kSizes[] = {
    {1, 1, 1000, 1000, {{128, 128}, {128, 128}}}, {2, 3, 777, 1301, {{192, 128}, {64, 128}}},
    {1, 2, 5000, 300, {{128, 176}, {80, 48}}},    {3, 1, 33, 6000, {{16, 16}, {128, 96}}},
    {1, 1, 1, 1, {{128, 128}, {64, 80}}},
};

// So many places that `classify` starts with a look at whole blocks of tiles.
inline const Size kManyPlaces = {8, 8, 1000, 1000, {{16, 16}, {128, 64}}};

using Fill = void (*)(Masks&);
struct Case {
  const char* name;
  Fill fill;
};
inline const Case kCases[] = {
    {"full", [](Masks& m) { m.push(Node{.op = Op::kConstant, .flag = 1}); }},
    {"nothing", [](Masks& m) { m.push(Node{.op = Op::kConstant, .flag = 0}); }},
    {"causal", [](Masks& m) { m.band(1 << 30, 0); }},
    {"window", [](Masks& m) { m.band(100, 20); }},
    {"prefix",
     [](Masks& m) {
       m.push(Node{.op = Op::kPrefix, .lo = m.program.kv_len / 3});
       m.band(1 << 30, 0);
       m.join(Op::kOr);
     }},
    {"causal_from",
     [](Masks& m) {
       m.intervals(IntervalForm::kFrom, false);
       m.band(1 << 30, 0);
       m.join(Op::kAnd);
     }},
    {"causal_run",
     [](Masks& m) {
       m.intervals(IntervalForm::kRun, true);
       m.band(1 << 30, 0);
       m.join(Op::kAnd);
     }},
    {"outside", [](Masks& m) { m.intervals(IntervalForm::kOutside, false); }},
    {"two_runs", [](Masks& m) { m.intervals(IntervalForm::kTwoRuns, true); }},
    {"segments", [](Masks& m) { m.segments(9); }},
    {"sorted_ids", [](Masks& m) { m.ids<int32_t>(true, false); }},
    {"open_ids", [](Masks& m) { m.ids<int64_t>(false, true); }},
    {"window_of_ids",
     [](Masks& m) {
       m.ids<int64_t>(true, false);
       m.band(300, 0);
       m.join(Op::kAnd);
       m.ids<int32_t>(true, true);
       m.join(Op::kOr);
     }},
    {"blocks", [](Masks& m) { m.blocks(64, 128); }},
    {"not_small_blocks",
     [](Masks& m) {
       m.blocks(16, 48);
       m.join(Op::kNot);
     }},
    {"reordered_from",
     [](Masks& m) {
       m.intervals(IntervalForm::kFrom, true);
       m.band(1 << 30, 0);
       m.join(Op::kAnd);
       m.program.reorder_keys = 1;
     }},
    {"reordered_runs_of_shared_heads",
     [](Masks& m) {
       m.intervals(IntervalForm::kTwoRuns, true);
       m.program.reorder_keys = 1;
       m.program.order_divisor = m.program.heads;
     }},
    {"reordered_bits",
     [](Masks& m) {
       m.dense<uint8_t>('r', false, 40);
       m.program.reorder_keys = 1;
     }},
    {"dense_u8", [](Masks& m) { m.dense<uint8_t>('r', false, 1000); }},
    {"dense_u8_scattered", [](Masks& m) { m.dense<uint8_t>('r', false, 1); }},
    {"dense_u8_padded", [](Masks& m) { m.dense<uint8_t>('p', false, 500); }},
    {"dense_f16", [](Masks& m) { m.dense<uint16_t>('r', true, 300); }},
    {"dense_f32_transposed", [](Masks& m) { m.dense<uint32_t>('c', true, 300); }},
    {"dense_i64", [](Masks& m) { m.dense<uint64_t>('r', false, 300); }},
    {"dense_one_row", [](Masks& m) { m.dense<uint8_t>('-', false, 200); }},
    {"dense_one_column",
     [](Masks& m) {
       m.dense<uint32_t>('|', false, 150);
       m.band(1 << 30, 0);
       m.join(Op::kAnd);
     }},
};

// Every case in every size, or (quickly) in one size each; `build(masks, shapes)` returns a
// BuiltPlan.
template <typename Build>
void check_plans(bool quickly, Build build) {
  std::vector<Size> sizes(std::begin(kSizes), std::end(kSizes));
  if (!quickly) sizes.push_back(kManyPlaces);
  unsigned seed = 0;
  for (size_t i = 0; i < std::size(kCases); ++i) {
    for (size_t j = 0; j < sizes.size(); ++j) {
      const Size& size = sizes[j];
      ++seed;
      if (quickly && j != i % sizes.size()) continue;
      SCOPED_TRACE(std::string(kCases[i].name) + ", q_len " + std::to_string(size.q_len) +
                   ", kv_len " + std::to_string(size.kv_len));
      Masks masks(seed, size.batches, size.heads, size.q_len, size.kv_len);
      kCases[i].fill(masks);
      expect_same_plan(masks.program, size.shapes, build(masks, size.shapes));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  {  // several groups of seen keys
    SCOPED_TRACE("several groups");
    Masks masks(8, 1, 2, 5000, 14000);
    masks.intervals(IntervalForm::kRun, true);
    masks.band(1 << 30, 1000);
    masks.join(Op::kAnd);
    masks.program.reorder_keys = 1;
    const plan::TileShapes shapes = {{192, 128}, {64, 128}};
    expect_same_plan(masks.program, shapes, build(masks, shapes));
  }
  for (const auto& [q_len, kv_len] : {std::pair{0, 0}, {0, 500}, {500, 0}}) {
    Masks masks(7, 1, 1, q_len, kv_len);
    masks.push(Node{.op = Op::kConstant, .flag = 1});
    const plan::TileShapes shapes = {{128, 128}, {64, 128}};
    expect_same_plan(masks.program, shapes, build(masks, shapes));
  }
}

}  // namespace anymask::cuda
