// Orders the keys of a scattered mask so that similar columns share tiles: keys that some row sees
// come first, in groups by first row, each group sorted by last row. The CPU's order exactly.
//
// `see_keys` finds the first and last row of every key; `order_keys` sorts, one block a place: even
// 131072 keys take a block only a few hundred microseconds, so a sort over the whole device, with
// its many launches, would gain nothing where masks have many places.
#pragma once

#include "cuda/device/plan_params.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// ---- what sees a key -------------------------------------------------------------------------------

inline bool any_visible(const rules::Program& program, rules::Place place, int key, int row_begin,
                        int row_end) {
  const rules::Tile tile = {row_begin, row_end, key, key + 1};
  return (rules::key_class(program, place, tile) & rules::kVisible) != 0;
}

// The rows that see a key lie in [first, last). Halves the rows with the column's class over each
// half: about 2 log2(rows) looks.
inline KeyRows seen_rows(const rules::Program& program, rules::Place place, int key) {
  if (!any_visible(program, place, key, 0, program.q_len)) return {program.q_len, 0};
  int low = 0, high = program.q_len;  // the first visible row lies in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_visible(program, place, key, low, middle) ? high : low) = middle;
  }
  const int first = low;
  high = program.q_len;  // and so does the last
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_visible(program, place, key, middle, high) ? low : high) = middle;
  }
  return {first, low + 1};
}

inline void see_keys(const KeyOrderParams& params) {
  const rules::Program& program = params.program;
  const int key_block = static_cast<int>(blockIdx.x % params.key_blocks);
  const int order = static_cast<int>(blockIdx.x / params.key_blocks);
  const int key = key_block * kSeeThreads + static_cast<int>(threadIdx.x);
  if (key >= program.kv_len) return;
  const int orders = program.heads / program.order_divisor;
  KeyRows all = {program.q_len, 0};
  for (int i = 0; program.q_len > 0 && i < program.order_divisor; ++i) {
    const int head = order % orders * program.order_divisor + i;
    const KeyRows seen = seen_rows(program, {order / orders, head}, key);
    all = {rules::min_of(all.first, seen.first), rules::max_of(all.last, seen.last)};
  }
  params.seen[int64_t{order} * program.kv_len + key] = all;
}

// ---- a stable radix sort by one block --------------------------------------------------------------
//
// An item is a value above kKeyBits and a key below. Each warp owns a run of items: it counts its
// digits, the block turns counts into positions, each warp puts its items there in order.

inline constexpr int kDigits = 256;
inline constexpr int kKeyBits = 30;
inline constexpr uint64_t kKeyMask = (uint64_t{1} << kKeyBits) - 1;

struct SortBlock {
  int32_t position[kSortWarps][kDigits];
  int32_t total[kDigits];
  int32_t seen_keys;
};

// Walks this warp's run of items, 32 at a time: use(item, position), where the counter of the
// item's digit tells the position and moves on.
template <typename Use>
inline void for_each_item(const uint64_t* items, int count, int shift, SortBlock& block, Use use) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int run = (count + kSortWarps - 1) / kSortWarps;
  const int begin = rules::min_of(warp * run, count);
  const int end = rules::min_of(begin + run, count);
  uint64_t next = begin + lane < end ? items[begin + lane] : 0;
  for (int i = begin; i < end; i += 32) {
    const uint64_t item = next;
    const bool real = i + lane < end;
    if (i + 32 + lane < end) next = items[i + 32 + lane];
    const int digit = real ? static_cast<int>(item >> shift) & (kDigits - 1) : kDigits;
    const uint32_t peers = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(peers & rules::low_bits(lane));
    const int start = real ? block.position[warp][digit] : 0;
    __syncwarp();
    if (real && rank == 0) block.position[warp][digit] = start + __popc(peers);
    if (real) use(item, start + rank);
    __syncwarp();
  }
}

inline void sort_digit(const uint64_t* from, uint64_t* to, int count, int shift,
                       SortBlock& block) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads) {
    block.position[i / kDigits][i % kDigits] = 0;
  }
  __syncthreads();
  for_each_item(from, count, shift, block, [](uint64_t, int) {});
  __syncthreads();
  // Where this digit's items of warp 0 start, then those of warp 1, ...
  if (thread < kDigits) {
    int sum = 0;
    for (int warp = 0; warp < kSortWarps; ++warp) {
      const int mine = block.position[warp][thread];
      block.position[warp][thread] = sum;
      sum += mine;
    }
    block.total[thread] = sum;
  }
  __syncthreads();
  if (thread < kDigits) {
    int before = 0;
    for (int digit = 0; digit < thread; ++digit) before += block.total[digit];
    for (int warp = 0; warp < kSortWarps; ++warp) block.position[warp][thread] += before;
  }
  __syncthreads();
  for_each_item(from, count, shift, block,
                [to](uint64_t item, int position) { to[position] = item; });
  __syncthreads();
}

// Sorts by the lowest `bits` of the values; returns where the result is.
inline uint64_t* sort_items(uint64_t* items, uint64_t* other, int count, int bits,
                            SortBlock& block) {
  for (int bit = 0; bit < bits; bit += 8) {
    sort_digit(items, other, count, kKeyBits + bit, block);
    uint64_t* const sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

inline int bits_of(int value) { return value > 0 ? 32 - __clz(value) : 1; }

// sqrt(tiles) groups of sqrt(tiles) tiles each, rounded to the nearest.
inline int group_count(int seen_keys, int tile_columns) {
  const int tiles = (seen_keys + tile_columns - 1) / tile_columns;
  int groups = 1;
  while (groups * groups + groups < tiles) ++groups;
  return groups;
}

inline void order_keys(const KeyOrderParams& params) {
  __shared__ SortBlock block;
  const int thread = static_cast<int>(threadIdx.x);
  const int keys = params.program.kv_len;
  const int row_bits = bits_of(params.program.q_len);
  const int64_t place = blockIdx.x;
  const KeyRows* seen = params.seen + place * keys;
  uint64_t* items = params.items + place * 2 * keys;

  if (thread == 0) block.seen_keys = 0;
  __syncthreads();
  for (int key = thread; key < keys; key += kSortThreads) {
    items[key] = static_cast<uint64_t>(seen[key].first) << kKeyBits | static_cast<uint64_t>(key);
    if (seen[key].last > 0) atomicAdd(&block.seen_keys, 1);
  }
  __syncthreads();
  uint64_t* by_first = sort_items(items, items + keys, keys, row_bits, block);

  const int count = block.seen_keys;
  const int groups = group_count(count, params.tile_columns);
  for (int i = thread; i < keys; i += kSortThreads) {
    const uint64_t key = by_first[i] & kKeyMask;
    // Group g holds ranks from floor(count * g / groups) on; keys that nobody sees come after all.
    const int64_t group = i < count ? (int64_t{i + 1} * groups - 1) / count : groups;
    const uint64_t last = i < count ? static_cast<uint64_t>(seen[key].last) : 0;
    by_first[i] = (static_cast<uint64_t>(group) << row_bits | last) << kKeyBits | key;
  }
  __syncthreads();
  uint64_t* const other = by_first == items ? items + keys : items;
  const uint64_t* sorted = sort_items(by_first, other, keys, row_bits + bits_of(groups), block);
  for (int i = thread; i < keys; i += kSortThreads) {
    params.order[place * keys + i] = static_cast<int32_t>(sorted[i] & kKeyMask);
  }
}

}  // namespace anymask::cuda
