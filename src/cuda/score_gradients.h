// Score options in the backward pass, host side: what a call's options ask of its kernels and its
// workspace, and how their gradients end.
#pragma once

#include <vector>

#include "anymask/attention.hpp"
#include "cuda/device/sm90/backward_config.h"
#include "cuda/kernel.h"

namespace anymask::cuda {

// The options of a call and the gradients that it wants of them ("none": not wanted).
struct ScoreCall {
  const ScoreOptions& options;
  const Tensor& dkey_bias;
  const Tensor& dbias;
  const Tensor& dsink;
};

// (batch, kv head) pairs that one launch of the main kernel works on: first, first + step, ...
struct PairRound {
  int32_t first, step, count;
};

// Where gradients of score options are summed. Offsets are into the pass's workspace.
class ScoreGradients {
 public:
  // reordered: keys come in a plan's order. The size of a workspace does not depend on it.
  ScoreGradients(const ScoreCall& call, const Problem& problem, bool reordered = false);

  // The bits of the main kernel's `features`. A bias with one row for all queries counts as one of
  // keys. kBiasTiles where the copy engine can bring the bias of pairs and take its gradient:
  // 16-bit, rows of whole 16 bytes, keys in the caller's order, head dimensions up to 128, no
  // softcap.
  int32_t features() const { return features_; }
  // Whether rows' numbers are wanted in float32.
  bool row_numbers() const { return row_numbers_; }
  // Bytes of the float32 sums of keys [batch][q_heads][kv_len] and of pairs (of dbias's shape,
  // where it is 16-bit and shared, or of as many whole tiles).
  int64_t key_bytes() const { return 4 * keys_; }
  int64_t pair_bytes() const { return 4 * pairs_; }

  // A bias's gradient that several heads or batch entries add to is the business of one block at a
  // time: so the order of its sums is fixed.
  std::vector<PairRound> rounds() const;

  // Sets the parameters that these gradients and their options ask for; params.row_numbers,
  // key_sums and, where there are pair_bytes, pair_sums are where the sums lie.
  void set(BackwardParams& params, float* pair_sums, double scale, bool reordered) const;
  // Before the main kernel: zeros where it only adds, or may skip tiles.
  void begin(const BackwardParams& params, int ordinal, CuStream stream) const;
  // After it.
  void end(const BackwardParams& params, int ordinal, CuStream stream) const;
  // Instead of all that, for a batch without entries: zeros.
  void write_zeros(int ordinal, CuStream stream) const;

 private:
  bool tiles_fit(bool reordered) const;
  bool pairs_wanted() const { return call_.dbias.given() && !columns_; }

  const ScoreCall call_;
  const Problem& problem_;
  bool columns_;                                      // a bias of one row
  bool heads_share_ = false, batches_share_ = false;  // a gradient of pairs
  int32_t features_ = 0;
  bool row_numbers_;
  int64_t keys_ = 0, pairs_ = 0;
  int64_t tile_sums_ = 0;  // of one head, where pairs_ are in tiles
};

std::vector<KernelConfig> score_sum_kernels();

}  // namespace anymask::cuda
