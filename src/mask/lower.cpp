#include "mask/lower.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "mask/describe.h"

namespace anymask {
namespace {

using rules::Array;
using rules::Node;
using rules::Op;
using rules::Program;

// Lengths stay under 2^30 so that row and column arithmetic fits 32 bits in every rule.
constexpr int64_t kMaxLength = int64_t{1} << 30;
constexpr int32_t kOpen = 1 << 30;

int32_t saturate(int64_t value) {
  return static_cast<int32_t>(std::clamp<int64_t>(value, -kOpen, kOpen));
}

bool is_index(DType dtype) { return dtype == DType::i32 || dtype == DType::i64; }
bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f64;
}

// Dimensions missing in front count as 1.
Tensor as_4d(const Tensor& tensor) {
  Tensor wide = tensor;
  const int missing = 4 - tensor.ndim;
  for (int i = 3; i >= 0; --i) {
    wide.shape[i] = i < missing ? 1 : tensor.shape[i - missing];
    wide.stride[i] = i < missing ? 0 : tensor.stride[i - missing];
  }
  wide.ndim = 4;
  return wide;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Lowering {
 public:
  Lowering(const Mask& mask, const Problem& problem) : mask_(mask), problem_(problem) {}

  Program run() {
    check_problem();
    program_.q_len = static_cast<int32_t>(problem_.q_len);
    program_.kv_len = static_cast<int32_t>(problem_.kv_len);
    std::vector<Tree> stack;
    for (const MaskNode& node : mask_.nodes()) read(node, stack);
    if (stack.size() != 1) {
      throw InvalidValue("mask: " + std::to_string(mask_.nodes().size()) +
                         " nodes do not form one tree in postfix order");
    }
    if (stack[0].nodes.size() > rules::kMaxNodes) {
      throw InvalidValue("mask has " + std::to_string(stack[0].nodes.size()) +
                         " nodes once lowered; at most " + std::to_string(rules::kMaxNodes) +
                         " fit");
    }
    if (stack[0].depth > rules::kMaxDepth) throw InvalidValue("mask is nested too deeply");
    for (Node& node : stack[0].nodes) {
      set_divisor(node.rows);
      set_divisor(node.columns);
      program_.nodes[program_.count++] = node;
    }
    // A kv head's keys have one order, so mask heads that share a kv head share it too.
    program_.order_divisor =
        program_.heads / static_cast<int32_t>(std::gcd(problem_.kv_heads, program_.heads));
    return program_;
  }

 private:
  // A subtree in postfix order and the stack places that it needs.
  struct Tree {
    std::vector<Node> nodes;
    int depth = 1;
  };

  void check_problem() const {
    const auto at_least = [](const char* name, int64_t value, int64_t least) {
      if (value < least) {
        throw InvalidValue(std::string(name) + " is " + std::to_string(value) +
                           "; it must be at least " + std::to_string(least));
      }
    };
    at_least("batch", problem_.batch, 0);
    at_least("q_heads", problem_.q_heads, 1);
    at_least("kv_heads", problem_.kv_heads, 1);
    at_least("q_len", problem_.q_len, 0);
    at_least("kv_len", problem_.kv_len, 0);
    if (problem_.q_len >= kMaxLength || problem_.kv_len >= kMaxLength) {
      throw InvalidValue("q_len and kv_len must be under 2^30, got " +
                         std::to_string(problem_.q_len) + " and " +
                         std::to_string(problem_.kv_len));
    }
  }

  static void push(std::vector<Tree>& stack, const Node& leaf) { stack.push_back({{leaf}, 1}); }

  void join(std::vector<Tree>& stack, Op op) const {
    if (stack.size() < 2) throw InvalidValue("mask: & or | without two operands before it");
    Tree b = std::move(stack.back());
    stack.pop_back();
    Tree a = std::move(stack.back());
    stack.pop_back();
    // The deeper operand first: its places are free again when the other one runs.
    if (a.depth < b.depth) std::swap(a, b);
    a.depth = a.depth == b.depth ? a.depth + 1 : a.depth;
    a.nodes.insert(a.nodes.end(), b.nodes.begin(), b.nodes.end());
    a.nodes.push_back(Node{.op = op});
    stack.push_back(std::move(a));
  }

  void read(const MaskNode& node, std::vector<Tree>& stack) {
    switch (node.kind) {
      case MaskKind::full:
        return push(stack, Node{.op = Op::kConstant, .flag = 1});
      case MaskKind::causal:
        return push(stack, band(-1, 0));
      case MaskKind::sliding_window:
        return push(stack, band(node.left, node.right));
      case MaskKind::prefix_lm:
        push(stack, prefix(node));
        push(stack, band(-1, 0));
        return join(stack, Op::kOr);
      case MaskKind::documents:
        return push(stack, ids(node, "documents: q_ids", "documents: kv_ids", 0));
      case MaskKind::cu_documents:
        return push(stack, segments(node));
      case MaskKind::intervals:
        push(stack, intervals(node));
        if (node.left == 0) return;
        push(stack, band(-1, 0));
        return join(stack, Op::kAnd);
      case MaskKind::blocks:
        return push(stack, blocks(node));
      case MaskKind::dense:
        return push(stack, dense(node));
      case MaskKind::ids:
        return push(stack, ids(node, "ids: eq", "ids: ek", 1));
      case MaskKind::logical_not:
        if (stack.empty()) throw InvalidValue("mask: ~ without an operand before it");
        stack.back().nodes.push_back(Node{.op = Op::kNot});
        return;
      case MaskKind::reordered:
        if (stack.empty()) throw InvalidValue("mask: reordered without an operand before it");
        program_.reorder_keys = 1;
        return;
      case MaskKind::logical_and:
        return join(stack, Op::kAnd);
      case MaskKind::logical_or:
        return join(stack, Op::kOr);
    }
    throw InvalidValue("mask: unknown node kind " +
                       std::to_string(static_cast<int32_t>(node.kind)));
  }

  Node band(int64_t left, int64_t right) const {
    const int64_t offset = problem_.kv_len - problem_.q_len;
    return Node{.op = Op::kBand,
                .lo = left < 0 ? -kOpen : saturate(offset - std::min(left, kMaxLength)),
                .hi = right < 0 ? kOpen : saturate(offset + std::min(right, kMaxLength))};
  }

  Node prefix(const MaskNode& node) {
    if (!node.arrays[0].given()) return Node{.op = Op::kPrefix, .lo = saturate(node.left)};
    const Tensor& lengths = node.arrays[0];
    check_device("prefix_lm: n", lengths);
    if (!is_index(lengths.dtype)) fail_dtype("prefix_lm: n", lengths.dtype, "int32 or int64");
    if (lengths.ndim != 1 || (lengths.shape[0] != 1 && lengths.shape[0] != problem_.batch)) {
      fail_shape("prefix_lm: n", lengths, "[1] or [batch] = " + shape_text({problem_.batch}));
    }
    Node leaf{.op = Op::kPrefix};
    leaf.columns = array(lengths, lengths.shape[0], lengths.stride[0], 1, 0, 0, 0);
    return leaf;
  }

  Node segments(const MaskNode& node) const {
    const Tensor& boundaries = node.arrays[0];
    const char* name = "documents: cu_seqlens";
    check_device(name, boundaries);
    if (!is_index(boundaries.dtype)) fail_dtype(name, boundaries.dtype, "int32 or int64");
    if (boundaries.ndim != 1 || boundaries.shape[0] < 1) {
      fail_shape(name, boundaries, "[number of documents + 1]");
    }
    if (problem_.q_len != problem_.kv_len) {
      throw InvalidValue(std::string(name) + " needs q_len == kv_len, got " +
                         std::to_string(problem_.q_len) + " and " +
                         std::to_string(problem_.kv_len) + "; use ids of queries and keys");
    }
    Node leaf{.op = Op::kSegments, .lo = saturate(boundaries.shape[0])};
    leaf.columns.data = boundaries.data;
    leaf.columns.column_stride = boundaries.stride[0];
    leaf.columns.bytes = size_of(boundaries.dtype);
    return leaf;
  }

  Node ids(const MaskNode& node, const char* row_name, const char* column_name, int open) {
    Node leaf{.op = Op::kIds, .flag = open};
    leaf.rows = id_array(node.arrays[0], row_name, problem_.q_len, "q_len");
    leaf.columns = id_array(node.arrays[1], column_name, problem_.kv_len, "kv_len");
    return leaf;
  }

  // [length], [batch or 1, length] or [batch or 1, heads, length]
  Array id_array(const Tensor& given, const char* name, int64_t length, const char* length_name) {
    check_device(name, given);
    if (!is_index(given.dtype)) fail_dtype(name, given.dtype, "int32 or int64");
    Tensor wide = as_4d(given);
    if (given.ndim < 1 || given.ndim > 3 || wide.shape[3] != length) {
      fail_shape(name, given,
                 std::string("[batch or 1, heads, ") + length_name + "] with " + length_name +
                     " = " + std::to_string(length));
    }
    // [batch, length]: as_4d put the batch where heads are.
    const bool two = given.ndim == 2;
    const int64_t batches = two ? wide.shape[2] : wide.shape[1];
    const int64_t batch_stride = two ? wide.stride[2] : wide.stride[1];
    const int64_t heads = two ? 1 : wide.shape[2];
    check_batch_heads(name, given, batches, heads);
    return array(given, batches, batch_stride, heads, two ? 0 : wide.stride[2], wide.stride[3], 0);
  }

  Node intervals(const MaskNode& node) {
    const char* name = "intervals: startend_row_indices";
    const Tensor& given = node.arrays[0];
    const bool causal = node.left != 0;
    check_device(name, given);
    if (given.dtype != DType::i32) fail_dtype(name, given.dtype, "int32");
    const int64_t n = given.ndim == 4 ? given.shape[3] : 0;
    const bool fits = causal ? n == 1 || n == 2 : n == 2 || n == 4;
    if (given.ndim != 4 || given.shape[2] != problem_.kv_len || !fits) {
      fail_shape(name, given,
                 "[batch or 1, mask heads, kv_len = " + std::to_string(problem_.kv_len) +
                     ", n] with n = " + (causal ? "1 or 2 (causal)" : "2 or 4 (not causal)"));
    }
    check_batch_heads(name, given, given.shape[0], given.shape[1]);
    using rules::IntervalForm;
    const IntervalForm form = n == 1   ? IntervalForm::kFrom
                              : n == 4 ? IntervalForm::kTwoRuns
                              : causal ? IntervalForm::kRun
                                       : IntervalForm::kOutside;
    Node leaf{.op = Op::kIntervals, .flag = static_cast<int32_t>(form)};
    leaf.columns = array(given, given.shape[0], given.stride[0], given.shape[1], given.stride[1],
                         given.stride[2], given.stride[3]);
    return leaf;
  }

  Node blocks(const MaskNode& node) {
    const char* name = "blocks: block_mask";
    const Tensor& given = node.arrays[0];
    check_device(name, given);
    if (is_float(given.dtype)) fail_dtype(name, given.dtype, "a bool or integer type");
    const int64_t rows = node.left, columns = node.right;
    if (rows <= 0 || rows % 16 != 0 || columns <= 0 || columns % 16 != 0 || rows > kOpen ||
        columns > kOpen) {
      throw InvalidValue("blocks: block_size is " + std::to_string(rows) + " x " +
                         std::to_string(columns) + "; both must be multiples of 16");
    }
    const Tensor wide = as_4d(given);
    const int64_t row_blocks = ceil_div(problem_.q_len, rows);
    const int64_t column_blocks = ceil_div(problem_.kv_len, columns);
    if (given.ndim < 2 || given.ndim > 4 || wide.shape[2] != row_blocks ||
        wide.shape[3] != column_blocks) {
      fail_shape(name, given,
                 "[batch or 1, mask heads, " + std::to_string(row_blocks) + ", " +
                     std::to_string(column_blocks) + "]: one entry per block of " +
                     std::to_string(rows) + " x " + std::to_string(columns));
    }
    check_batch_heads(name, given, wide.shape[0], wide.shape[1]);
    Node leaf{
        .op = Op::kBlocks, .lo = static_cast<int32_t>(rows), .hi = static_cast<int32_t>(columns)};
    leaf.columns = array(wide, wide.shape[0], wide.stride[0], wide.shape[1], wide.stride[1],
                         wide.stride[2], wide.stride[3]);
    return leaf;
  }

  Node dense(const MaskNode& node) {
    const char* name = "dense: allowed";
    const Tensor& given = node.arrays[0];
    check_device(name, given);
    const Tensor wide = as_4d(given);
    const auto fits = [](int64_t size, int64_t full) { return size == 1 || size == full; };
    if (given.ndim < 2 || given.ndim > 4 || !fits(wide.shape[2], problem_.q_len) ||
        !fits(wide.shape[3], problem_.kv_len)) {
      fail_shape(name, given,
                 "[batch or 1, mask heads, q_len or 1, kv_len or 1] with q_len = " +
                     std::to_string(problem_.q_len) +
                     ", kv_len = " + std::to_string(problem_.kv_len));
    }
    check_batch_heads(name, given, wide.shape[0], wide.shape[1]);
    Node leaf{.op = Op::kDense, .flag = is_float(given.dtype) ? 1 : 0};
    leaf.columns =
        array(wide, wide.shape[0], wide.stride[0], wide.shape[1], wide.stride[1],
              wide.shape[2] == 1 ? 0 : wide.stride[2], wide.shape[3] == 1 ? 0 : wide.stride[3]);
    return leaf;
  }

  void check_device(const char* name, const Tensor& tensor) const {
    if (!tensor.given()) throw InvalidValue(std::string(name) + " is missing");
    if (tensor.device != problem_.device) {
      throw InvalidType(std::string(name) + " is on " + device_text(tensor.device) +
                        "; it must be on " + device_text(problem_.device) +
                        ", where the queries are");
    }
  }

  void check_batch_heads(const char* name, const Tensor& given, int64_t batches, int64_t heads) {
    if (batches != 1 && batches != problem_.batch) {
      throw InvalidValue(std::string(name) + " has shape " + shape_text(given) +
                         "; its batch must be 1 or " + std::to_string(problem_.batch));
    }
    if (heads < 1 || problem_.q_heads % heads != 0) {
      throw InvalidValue(std::string(name) + " has shape " + shape_text(given) + "; its " +
                         std::to_string(heads) + " mask heads must divide the " +
                         std::to_string(problem_.q_heads) + " query heads");
    }
  }

  // Notes the batch entries and heads that the array tells apart; head_divisor holds its heads
  // until all leaves are read.
  Array array(const Tensor& tensor, int64_t batches, int64_t batch_stride, int64_t heads,
              int64_t head_stride, int64_t row_stride, int64_t column_stride) {
    if (batches != 1) program_.batches = static_cast<int32_t>(batches);
    program_.heads = static_cast<int32_t>(std::lcm(static_cast<int64_t>(program_.heads), heads));
    return Array{.data = tensor.data,
                 .batch_stride = batches == 1 ? 0 : batch_stride,
                 .head_stride = heads == 1 ? 0 : head_stride,
                 .row_stride = row_stride,
                 .column_stride = column_stride,
                 .bytes = size_of(tensor.dtype),
                 .head_divisor = static_cast<int32_t>(heads)};
  }

  void set_divisor(Array& array) const {
    array.head_divisor = program_.heads / std::max(array.head_divisor, 1);
  }

  const Mask& mask_;
  const Problem& problem_;
  Program program_{};
};

}  // namespace

rules::Program lower(const Mask& mask, const Problem& problem) {
  return Lowering(mask, problem).run();
}

}  // namespace anymask
