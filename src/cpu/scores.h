// A call's score options (anymask::ScoreOptions), tile by tile.
#pragma once

#include <vector>

#include "anymask/attention.hpp"
#include "cpu/keys.h"
#include "plan/layout.h"
#include "rules/philox.h"

namespace anymask::cpu {

class TileScores {
 public:
  // q [batch, length, heads, dim].
  TileScores(const ScoreOptions& options, const Tensor& q, plan::TileShape tile);

  // Whether anything is to be done at all.
  bool any() const { return any_; }
  bool drops() const { return threshold_ > 0; }
  // Whether the heads of a group may be the rows of one tile: all rows then share their key biases,
  // and none may be dropped.
  bool groups_may_share(int64_t group) const;
  // Memory that a thread needs for one tile.
  size_t bytes() const { return bytes_; }

  ScoreChanges changes(char* memory) const;
  // Logits without a value from query head `head` on; nullptr: none.
  const double* sinks(int64_t head) const {
    return sinks_.empty() ? nullptr : sinks_.data() + head;
  }

  // The biases of rows [row, row + rows) of a query head; `heads_are_rows`: of that row of `rows`
  // heads from `head` on.
  TileBiases biases(const TileKeys& keys, int64_t head, int64_t row, int rows, bool heads_are_rows,
                    char* memory) const;
  // The pairs that dropout keeps; none are given where it keeps all.
  Words kept(const TileKeys& keys, int64_t head, int64_t row, int rows, char* memory) const;

 private:
  RowsIn pairs_of(const TileKeys& keys, int64_t head, int64_t row, int rows, bool heads_are_rows,
                  char* gathered) const;
  const double* keys_of(const TileKeys& keys, int64_t head, double* values) const;

  const ScoreOptions& options_;
  int64_t q_heads_;
  bool any_ = false;
  bool wide_ = false;
  uint32_t threshold_ = 0;
  int64_t seed_ = 0, offset_ = 0;
  std::vector<double> sinks_;
  // A thread's memory: a tile's biases as sums, gathered biases, biases of keys, kept words.
  size_t sums_bytes_ = 0, gathered_bytes_ = 0, keys_bytes_ = 0, bytes_ = 0;
};

}  // namespace anymask::cpu
