#include "cuda/backward_work.h"

#include <algorithm>

namespace anymask::cuda {
namespace {

// What there is for blocks to do side by side, before anything is divided.
int64_t items_of(const Problem& problem, int64_t heads) {
  return problem.batch * heads * ((problem.kv_len + 127) / 128);
}

// Q, dO and the float32 sums of dQ: of a row, and of so many query heads.
int64_t bytes_of_row(const Problem& problem) {
  return problem.head_dim * 6 + problem.v_head_dim * 2;
}
int64_t bytes_of_pair(const Problem& problem, int64_t heads) {
  return problem.q_len * heads * bytes_of_row(problem);
}

}  // namespace

int64_t row_tiles_of(int64_t q_len) { return (q_len + kBackwardRows - 1) / kBackwardRows; }

int64_t key_tiles_of(int64_t kv_len, const BackwardConfig& config) {
  return (kv_len + config.columns() - 1) / config.columns();
}

// Where Q, dO and the float32 dQ of a group, for the two pairs that run at a time, do not fit L2
// (50 MiB on the smallest Hopper); and where items are few and long.
bool divides_items(const Problem& problem) {
  constexpr int64_t kL2Bytes = 50 << 20;
  constexpr int64_t kLongItem = 16;  // row tiles; adding up dK and dV costs two launches
  const int64_t group = problem.q_heads / problem.kv_heads;
  const int64_t bytes = bytes_of_pair(problem, group);
  const bool few = items_of(problem, problem.kv_heads) <= kMultiprocessors / 2;
  return (group > 1 && 2 * bytes > kL2Bytes) ||
         (few && row_tiles_of(problem.q_len) * group >= kLongItem);
}

int32_t segment_tiles(const Problem& problem, bool keys_reordered) {
  const auto row_tiles = static_cast<int32_t>(std::max<int64_t>(1, row_tiles_of(problem.q_len)));
  // Reordered keys meet rows here and there. Blocks at a few key tiles of several heads, each
  // somewhere else, would fetch Q, dO and dQ of all heads from memory again and again (S = 32768,
  // 1024 of the keys kept: 6.5 instead of 3.7 ms).
  constexpr int32_t kReorderedTiles = 64;  // 4096 rows; D = 128: 4 MiB
  // Of few items, as many as give each multiprocessor four.
  constexpr int32_t kLeastTiles = 4;
  const int64_t items = std::max<int64_t>(1, items_of(problem, problem.q_heads));
  const auto segments = static_cast<int32_t>((4 * kMultiprocessors + items - 1) / items);
  const int32_t tiles = std::max(kLeastTiles, (row_tiles + segments - 1) / segments);
  return std::min({row_tiles, tiles, keys_reordered ? kReorderedTiles : tiles});
}

// Where no order is asked for: chains need no clearing and no converting. Loose ones save 3 to 8%
// of a pass at head dimension 64, and 5 to 30 at 256. At 128 they gain nothing in long rows, where
// power is the bound; in short ones ordered chains gain 2 to 6%, for full masks (of others most
// have dQ apart). Few items are better balanced heaviest first, which chains cannot be: 8 heads of
// 2048 rows take 1.3 times as long.
int32_t chained_by(const Problem& problem, bool deterministic, int32_t features) {
  constexpr int64_t kShortRows = 2048;
  if (deterministic) return kOrdered;
  const bool few = items_of(problem, problem.kv_heads) < 4 * kMultiprocessors;
  if (features != 0 || few || divides_items(problem)) return kUnchained;
  const int64_t depth = std::max(problem.head_dim, problem.v_head_dim);
  if (depth <= 64 || depth > 128) return kLoose;
  const bool grouped = problem.q_heads != problem.kv_heads;
  return problem.q_len <= kShortRows && !grouped ? kOrdered : kUnchained;
}

// As many pairs as have Q, dO and the float32 dQ of their query heads in two fifths of L2. But
// the last ones run together whatever the cache holds, four items for every multiprocessor:
// heaviest first only balances where there is something to sort (causal, S = 8192, B = 4: 525 ->
// 548 TFLOP/s). With grouped heads items are as many times as heavy, so as many fewer will do: side
// by side they only push each other's rows out of L2 (32/8, full, S = 1024: 234 -> 469).
// Chained, blocks of a pair have to run together (and where masks are sparse, more pairs:
// chunk_of). With segments of rows work goes from one to the next.
Chunks::Chunks(const Problem& problem, const BackwardConfig& config, const Gpu& gpu, int64_t pairs,
               int64_t key_tiles, int segments) {
  const int64_t group = config.adds_keys != 0 ? 1 : problem.q_heads / problem.kv_heads;
  const int64_t bytes = bytes_of_pair(problem, group);
  near_tiles = gpu.l2_bytes * 32 / 100 / (kBackwardRows * bytes_of_row(problem));
  most_pairs = gpu.l2_bytes * 5 / 4 / std::max<int64_t>(1, bytes) + 1;
  blocks_fit = (gpu.multiprocessors / std::max<int64_t>(1, key_tiles) + 1) * bytes <= gpu.l2_bytes;
  if (segments > 1) {
    size = tail = 1;
    return;
  }
  const int64_t enough =
      config.has_turns()
          ? 1
          : std::max<int64_t>(1, 4 * gpu.multiprocessors / std::max<int64_t>(1, key_tiles * group));
  size = gpu.l2_bytes * 2 / 5 / std::max<int64_t>(1, bytes);
  size = std::clamp<int64_t>(size, 1, pairs);
  tail = std::min(enough, pairs);
  tail += (pairs - tail) % size;  // before them, whole chunks
}

}  // namespace anymask::cuda
