// How the work of a backward pass is shared out: into items, segments of rows and chunks of pairs,
// and how the parts of dQ meet. Known before the mask is: only the plan knows that.
#pragma once

#include "anymask/types.hpp"
#include "cuda/device/sm90/backward_config.h"
#include "cuda/driver.h"

namespace anymask::cuda {

int64_t row_tiles_of(int64_t q_len);
int64_t key_tiles_of(int64_t kv_len, const BackwardConfig& config);

// Whether a group's query heads, and segments of the rows, are to be items of their own.
bool divides_items(const Problem& problem);

// Row tiles of a segment, where there are segments.
int32_t segment_tiles(const Problem& problem, bool keys_reordered);

// How the parts of dQ meet: kUnchained and so on.
int32_t chained_by(const Problem& problem, bool deterministic, int32_t features);

// How many (batch, kv head) pairs, and which at the end, run together.
struct Chunks {
  int64_t size, tail;
  int64_t near_tiles, most_pairs;  // BackwardParams
  bool blocks_fit;  // Q, dO and the sums of all pairs that blocks are at, in all of L2

  Chunks(const Problem& problem, const BackwardConfig& config, const Gpu& gpu, int64_t pairs,
         int64_t key_tiles, int segments);
};

}  // namespace anymask::cuda
