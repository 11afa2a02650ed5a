// Plans: how a mask falls on tiles, computed once and used by every layer, forward and backward.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "anymask/mask.hpp"

namespace anymask {

// Bytes of the buffer that a plan of `mask` for `problem` needs; from shapes alone.
int64_t plan_bytes(const Mask& mask, const Problem& problem);

// What calls a plan is good for: those of its mask and problem (tiles depend on all sizes, the
// batch among them), forward or both. Without what the backward pass needs it is made in less time.
enum class Passes { forward, both };

// Fills `buffer` (plan_bytes long, 256-byte aligned, on the problem's device). On CUDA the work is
// queued on `stream` (a CUstream) without host synchronisation.
void build_plan(const Mask& mask, const Problem& problem, void* buffer, int64_t bytes,
                void* stream = nullptr, Passes passes = Passes::both);

// A plan that owns its buffer, for CPU problems. Keeps the mask's views, not their memory.
class Plan {
 public:
  Plan(Mask mask, const Problem& problem, Passes passes = Passes::both);

  const Mask& mask() const { return mask_; }
  const Problem& problem() const { return problem_; }
  void* buffer() const { return buffer_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* buffer) const;
  };
  Mask mask_;
  Problem problem_;
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> buffer_;
};

// How many of a mask's tiles and pairs are allowed, over all its batch entries and heads.
struct MaskStatistics {
  int64_t pairs = 0;
  int64_t visible_pairs = 0;
  int64_t tiles = 0;
  int64_t all_tiles = 0;   // every pair allowed
  int64_t some_tiles = 0;  // needs its bits
};
MaskStatistics mask_statistics(const Mask& mask, const Problem& problem, int64_t tile_rows = 128,
                               int64_t tile_columns = 128);

// Writes 1 where a query may see a key, else 0: uint8 [mask batch, mask heads, q_len, kv_len],
// contiguous, where mask_shape tells the first two. CPU masks only.
void mask_to_dense(const Mask& mask, const Problem& problem, const Tensor& allowed);

// Writes the class of each tile (1 all, 2 none, 3 some):
// uint8 [mask batch, mask heads, ceil(q_len / tile_rows), ceil(kv_len / tile_columns)].
void mask_tile_classes(const Mask& mask, const Problem& problem, int64_t tile_rows,
                       int64_t tile_columns, const Tensor& classes);

// Batch entries (1 or batch) and heads (a divisor of q_heads) that a mask tells apart.
struct MaskShape {
  int64_t batches = 1;
  int64_t heads = 1;
};
MaskShape mask_shape(const Mask& mask, const Problem& problem);

// Recovers startend_row_indices from a dense mask [batch, heads, q_len, kv_len] (uint8, non-zero =
// allowed): fills `indices` (int32 [batch, heads, kv_len, 4], contiguous) with the fewest columns
// that can say it and returns their number, 1, 2 or 4: the first that many of each group of four.
// `causal`: pairs above the causal diagonal are not looked at. Throws InvalidValue naming the first
// column that would need more runs.
int intervals_from_dense(const Tensor& allowed, bool causal, const Tensor& indices);

}  // namespace anymask
