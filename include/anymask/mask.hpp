// Masks: values that say what each query may see.
#pragma once

#include <cstdint>
#include <vector>

#include "anymask/types.hpp"

namespace anymask {

enum class MaskKind : int32_t {
  full,
  causal,
  sliding_window,
  prefix_lm,
  documents,
  cu_documents,
  intervals,
  blocks,
  dense,
  ids,
  logical_not = 100,
  logical_and,
  logical_or,
  reordered,
};

// One node of a mask in postfix order. What `left`, `right` and `arrays` hold is the kind's own
// matter; the functions below fill them.
struct MaskNode {
  MaskKind kind = MaskKind::full;
  int64_t left = 0;
  int64_t right = 0;
  Tensor arrays[2];
};

// A tree of leaves in postfix order. Cheap to copy; arrays are views, so they must outlive every
// use of the mask. Combine with &, | and ~:
//
//   Mask mask = causal() & (documents(ids) | prefix_lm(16));
class Mask {
 public:
  Mask() : Mask(MaskNode{}) {}  // full
  explicit Mask(const MaskNode& leaf) : nodes_{leaf} {}
  explicit Mask(std::vector<MaskNode> postfix) : nodes_(std::move(postfix)) {}

  const std::vector<MaskNode>& nodes() const { return nodes_; }

  friend Mask operator&(const Mask& a, const Mask& b);
  friend Mask operator|(const Mask& a, const Mask& b);
  friend Mask operator~(const Mask& a);

  // The same mask, with the hint that its keys are scattered (random eviction, dynamic masks): the
  // plan drops the keys that nobody sees and brings those with similar first and last rows
  // together, so that more tiles are skipped. Results do not change; costs a gather of k and v.
  Mask reordered() const;

 private:
  std::vector<MaskNode> nodes_;
};

// Every query sees every key.
Mask full();

// Query i sees key j iff j <= i + kv_len - q_len (aligned bottom-right).
Mask causal();

// Query i sees keys i' - left .. i' + right with i' = i + kv_len - q_len. A negative size leaves
// that side open, so sliding_window(-1, 0) is causal().
Mask sliding_window(int64_t left, int64_t right = 0);

// causal(), and every query sees the first `length` keys.
Mask prefix_lm(int64_t length);
// The same with a length per batch entry: int32 or int64 [batch] or [1].
Mask prefix_lm(const Tensor& lengths);

// Query i sees key j iff q_ids[i] == kv_ids[j]. int32 or int64 [batch or 1, len] (or [len]).
Mask documents(const Tensor& q_ids, const Tensor& kv_ids);
inline Mask documents(const Tensor& ids) { return documents(ids, ids); }
// Documents back to back, the same in every batch entry: int32 [documents + 1] cumulative lengths
// from 0; rows and columns beyond the last length form a document of their own. q_len == kv_len.
Mask cumulative_documents(const Tensor& cu_seqlens);

// FlashMask's startend_row_indices: int32 [batch or 1, mask heads, kv_len, n], masked rows a key
// column, half-open, in any order. causal: n = 1 (LTS: masked iff i >= LTS) or 2 (LTS <= i < LTE),
// and the causal triangle on top. Not causal: n = 2 (i >= LTS or i < UTE) or
// 4 (LTS <= i < LTE or UTS <= i < UTE).
Mask intervals(const Tensor& startend_row_indices, bool causal);

// One entry per block of rows x columns, non-zero = keep: any integer type
// [batch or 1, mask heads, ceil(q_len / rows), ceil(kv_len / columns)]; block sizes are multiples
// of 16.
Mask blocks(const Tensor& block_mask, int64_t rows = 128, int64_t columns = 128);

// One element per pair, non-zero = keep: any type, broadcast over every dimension
// [batch or 1, mask heads, q_len or 1, kv_len or 1].
Mask dense(const Tensor& allowed);

// Dynamic masks: each query keeps the `keep` best-scored keys among those before it (causal,
// bottom-right), ties to the lower index, NaN below everything. Once `keep` better keys exist a key
// never comes back, so the whole mask is one row a key: fills `ends` (int32 [batch, heads, kv_len,
// 1], contiguous, on the scores' device) so that intervals(ends, true) is that mask. scores: f32
// [batch, heads, kv_len], any strides. CPU: O(kv_len log keep) per head. CUDA: queued on `stream`
// (a CUstream) without host synchronisation; needs top_keys_workspace_bytes of scratch memory
// there, aligned to 256 bytes.
void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends,
              void* stream = nullptr, void* workspace = nullptr, int64_t workspace_bytes = 0);
int64_t top_keys_workspace_bytes(const Tensor& scores);  // 0 on the CPU

// Query i sees key j iff eq[i] >= 0 or eq[i] == ek[j]. int32 or int64 [batch or 1, mask heads,
// len].
Mask ids(const Tensor& eq, const Tensor& ek);

}  // namespace anymask
