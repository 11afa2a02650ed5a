#include "anymask/mask.hpp"

#include <algorithm>

namespace anymask {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f64:
      return "float64";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::u8:
      return "uint8";
    case DType::i8:
      return "int8";
    case DType::i16:
      return "int16";
  }
  return "unknown";
}

Tensor::Tensor(void* memory, DType type, std::initializer_list<int64_t> sizes, Device where)
    : data(memory), dtype(type), device(where), ndim(static_cast<int32_t>(sizes.size())) {
  std::copy(sizes.begin(), sizes.begin() + std::min<int32_t>(ndim, 4), shape);
  int64_t step = 1;
  for (int i = std::min<int32_t>(ndim, 4) - 1; i >= 0; --i) {
    stride[i] = step;
    step *= shape[i];
  }
}

namespace {

Mask leaf(MaskKind kind, int64_t left = 0, int64_t right = 0, const Tensor& first = {},
          const Tensor& second = {}) {
  MaskNode node;
  node.kind = kind;
  node.left = left;
  node.right = right;
  node.arrays[0] = first;
  node.arrays[1] = second;
  return Mask(node);
}

Mask join(const Mask& a, const Mask& b, MaskKind kind) {
  std::vector<MaskNode> nodes = a.nodes();
  nodes.insert(nodes.end(), b.nodes().begin(), b.nodes().end());
  nodes.emplace_back().kind = kind;
  return Mask(std::move(nodes));
}

}  // namespace

Mask operator&(const Mask& a, const Mask& b) { return join(a, b, MaskKind::logical_and); }
Mask operator|(const Mask& a, const Mask& b) { return join(a, b, MaskKind::logical_or); }
Mask operator~(const Mask& a) {
  std::vector<MaskNode> nodes = a.nodes();
  nodes.emplace_back().kind = MaskKind::logical_not;
  return Mask(std::move(nodes));
}

Mask Mask::reordered() const {
  std::vector<MaskNode> nodes = nodes_;
  nodes.emplace_back().kind = MaskKind::reordered;
  return Mask(std::move(nodes));
}

Mask full() { return leaf(MaskKind::full); }
Mask causal() { return leaf(MaskKind::causal); }
Mask sliding_window(int64_t left, int64_t right) {
  return leaf(MaskKind::sliding_window, left, right);
}
Mask prefix_lm(int64_t length) { return leaf(MaskKind::prefix_lm, length); }
Mask prefix_lm(const Tensor& lengths) { return leaf(MaskKind::prefix_lm, 0, 0, lengths); }
Mask documents(const Tensor& q_ids, const Tensor& kv_ids) {
  return leaf(MaskKind::documents, 0, 0, q_ids, kv_ids);
}
Mask cumulative_documents(const Tensor& cu_seqlens) {
  return leaf(MaskKind::cu_documents, 0, 0, cu_seqlens);
}
Mask intervals(const Tensor& startend_row_indices, bool causal) {
  return leaf(MaskKind::intervals, causal ? 1 : 0, 0, startend_row_indices);
}
Mask blocks(const Tensor& block_mask, int64_t rows, int64_t columns) {
  return leaf(MaskKind::blocks, rows, columns, block_mask);
}
Mask dense(const Tensor& allowed) { return leaf(MaskKind::dense, 0, 0, allowed); }
Mask ids(const Tensor& eq, const Tensor& ek) { return leaf(MaskKind::ids, 0, 0, eq, ek); }

}  // namespace anymask
