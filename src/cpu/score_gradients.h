// Gradients of a call's biases and sink (anymask::ScoreOptions).
//
// A logit's gradient comes a tile at a time. It is summed over batch entries, heads and rows where
// the option has one entry for several, in an order that the threads do not change: a pair's
// gradient goes to one place of its own, or tasks that share one run in different rounds.
#pragma once

#include <vector>

#include "cpu/backend.h"
#include "cpu/keys.h"

namespace anymask::cpu {

class ScoreGradients {
 public:
  explicit ScoreGradients(const BackwardCall& call);

  // Memory that a thread needs for one tile.
  size_t bytes() const { return dlogits_bytes_ + rounded_bytes_; }
  // Where a thread's tile leaves its logits' gradient; nullptr: not wanted.
  void* dlogits(char* memory) const { return dlogits_bytes_ > 0 ? memory : nullptr; }
  // Key-value heads, counted through the batch, that may be worked on at a time.
  int64_t heads_a_round() const { return heads_a_round_; }

  void begin();
  // The sink's share of a row tile; lse and delta: sums, contiguous.
  void add_rows(int64_t batch, int64_t head, int64_t row_tile, int rows, double sink,
                const void* lse, const void* delta);
  // The biases' share of the tile whose gradient lies in `memory`.
  void add_tile(const TileKeys& keys, int64_t head, int64_t row, int rows, char* memory);
  void end();

 private:
  template <class T>
  void add_columns(const TileKeys& keys, int64_t head, int rows, const void* dlogits);
  void add_pairs(const TileKeys& keys, int64_t head, int64_t row, int rows, char* memory);
  template <class T>
  void sum_columns(const Tensor& to);
  void write(const Tensor& like, const void* sums, int count, void* to) const;

  const BackwardCall& call_;
  const BackwardKernel& kernel_;
  const int64_t batch_, q_len_, q_heads_, kv_len_, kv_heads_, row_tiles_;
  const int tile_keys_;
  const DType sum_type_;
  size_t dlogits_bytes_ = 0, rounded_bytes_ = 0;
  int64_t heads_a_round_;
  Memory columns_;  // sums over rows [batch][q_heads][kv_len]; for key biases and biases of one row
  Tensor pairs_;    // where pairs are summed: dbias, or in pairs_memory_ if that is 16-bit
  Memory pairs_memory_;
  std::vector<double> sinks_;  // [batch][q_heads][row_tiles]
};

}  // namespace anymask::cpu
