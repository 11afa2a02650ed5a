// Orders the keys of a scattered mask so that similar columns share tiles, as rules/key_rows.h
// says. The CPU's order exactly.
//
// `see_keys` finds the first and last row of every key. `collect_keys` puts those that some row
// sees before the others. `sort_keys` sorts them by first row, one block a place; under a causal
// mask they come sorted and it only looks. `halve_groups` orders a group, one block each.
#pragma once

#include "cuda/device/plan_params.h"
#include "cuda/device/radix_sort.h"
#include "rules/key_rows.h"

namespace anymask::cuda {

// An item is a value above kKeyBits and a key below.
inline constexpr int kKeyBits = 30;
inline constexpr uint64_t kKeyMask = (uint64_t{1} << kKeyBits) - 1;

inline uint64_t item_of(int32_t value, int key) {
  return static_cast<uint64_t>(value) << kKeyBits | static_cast<uint64_t>(key);
}

// ---- what sees a key ----------------------------------------------------------------------------

// A block's keys: a thread each.
struct OrderedKey {
  int64_t place;
  int block;  // of the place
  int key;

  explicit OrderedKey(const KeyOrderParams& params) {
    place = blockIdx.x / params.key_blocks;
    block = static_cast<int>(blockIdx.x % params.key_blocks);
    key = block * kSeeThreads + static_cast<int>(threadIdx.x);
  }
};

inline void see_keys(const KeyOrderParams& params) {
  __shared__ int32_t seen_keys;
  const rules::Program& program = params.program;
  const OrderedKey mine(params);
  if (threadIdx.x == 0) seen_keys = 0;
  __syncthreads();
  rules::KeyRows rows = rules::kNoRows;
  if (mine.key < program.kv_len) {
    const int orders = program.heads / program.order_divisor;
    const int order = static_cast<int>(mine.place);
    rows = rules::rows_of_order(program, order / orders, order % orders, mine.key);
    params.seen[mine.place * program.kv_len + mine.key] = rows;
  }
  const uint32_t seen = __ballot_sync(kWholeWarp, rows.last > 0);
  if (threadIdx.x % 32 == 0) atomicAdd(&seen_keys, __popc(seen));
  __syncthreads();
  if (threadIdx.x == 0) params.block_keys[blockIdx.x] = seen_keys;
}

// Adds up value over the threads of a block of kSeeThreads, which `sums` has a place a warp for.
inline int sum_of_block(int value, int32_t* sums) {
  value = __reduce_add_sync(kWholeWarp, value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < kSeeThreads / 32; ++warp) sum += sums[warp];
  return sum;
}

// Keys that some row sees become items, the others go where they stay.
inline void collect_keys(const KeyOrderParams& params) {
  constexpr int kWarps = kSeeThreads / 32;
  __shared__ int32_t before_sums[kWarps], all_sums[kWarps], warp_keys[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int keys = params.program.kv_len;
  const OrderedKey mine(params);

  int before = 0, all = 0;
  for (int block = thread; block < params.key_blocks; block += kSeeThreads) {
    const int count = params.block_keys[mine.place * params.key_blocks + block];
    all += count;
    if (block < mine.block) before += count;
  }
  rules::KeyRows rows = rules::kNoRows;
  if (mine.key < keys) rows = params.seen[mine.place * keys + mine.key];
  const uint32_t seen = __ballot_sync(kWholeWarp, rows.last > 0);
  if (thread % 32 == 0) warp_keys[thread / 32] = __popc(seen);
  before = sum_of_block(before, before_sums);
  all = sum_of_block(all, all_sums);
  for (int warp = 0; warp < thread / 32; ++warp) before += warp_keys[warp];
  before += __popc(seen & rules::low_bits(thread % 32));

  if (mine.key == 0) params.seen_keys[mine.place] = all;
  if (rows.last > 0) {
    params.items[mine.place * 2 * keys + before] = item_of(rows.first, mine.key);
  } else if (mine.key < keys) {
    params.order[mine.place * keys + all + mine.key - before] = mine.key;
  }
}

// ---- a stable radix sort by one block -----------------------------------------------------------

inline void sort_digit(const uint64_t* from, uint64_t* to, int count, int shift,
                       DigitCounts& digits) {
  const auto load = [from](int i) { return from[i]; };
  count_digits(load, count, shift, digits);
  place_digits(load, count, shift, digits, digits.total, 0,
               [to](uint64_t item, int position) { to[position] = item; });
}

// Sorts by the lowest `bits` of the values; returns where the result is.
inline uint64_t* sort_items(uint64_t* items, uint64_t* other, int count, int bits,
                            DigitCounts& digits) {
  for (int bit = 0; bit < bits; bit += 8) {
    sort_digit(items, other, count, kKeyBits + bit, digits);
    uint64_t* const sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

inline int bits_of(int value) { return value > 0 ? 32 - __clz(value) : 1; }

// ---- by first row -------------------------------------------------------------------------------

inline void sort_keys(const KeyOrderParams& params) {
  __shared__ DigitCounts digits;
  __shared__ int32_t unsorted;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t keys = params.program.kv_len;
  const int64_t place = blockIdx.x;
  const int count = params.seen_keys[place];
  uint64_t* items = params.items + place * 2 * keys;

  if (thread == 0) unsorted = 0;
  __syncthreads();
  for (int i = thread + 1; i < count; i += kSortThreads) {
    if (items[i - 1] > items[i]) unsorted = 1;
  }
  __syncthreads();
  if (unsorted == 0) return;
  const uint64_t* sorted =
      sort_items(items, items + keys, count, bits_of(params.program.q_len), digits);
  if (sorted == items) return;
  for (int i = thread; i < count; i += kSortThreads) items[i] = sorted[i];
}

// ---- groups -------------------------------------------------------------------------------------
//
// A group's keys are numbered by first row. Two lists of numbers hold every set of keys that is
// still to be halved at the same positions: one sorted by first row, one by last row. Halving a set
// by one list leaves that list as it is; the other one is partitioned and keeps its order.

inline constexpr int kLeastTileColumns = 16;
inline constexpr int kListWords = rules::kGroupKeys / 32;
inline constexpr int kThreadKeys = rules::kGroupKeys / kSortThreads;

// How the set of keys that a tile lies in is halved; that of a single tile is only sorted.
struct Half {
  int16_t begin, middle;  // positions
  bool by_first;
};

struct KeyLists {
  uint16_t by_first[rules::kGroupKeys], by_last[rules::kGroupKeys];
  bool to_right[rules::kGroupKeys];  // of a number
  uint32_t left[kListWords];         // a bit for each position of the list to partition: stays left
  int32_t left_before[kListWords];   // set bits of the words before
  Half halves[rules::kGroupKeys / kLeastTileColumns];  // of each tile

  uint16_t* list(bool first) { return first ? by_first : by_last; }
};

inline int left_before(const KeyLists& lists, int position) {
  return lists.left_before[position / 32] +
         __popc(lists.left[position / 32] & rules::low_bits(position % 32));
}

// Halves every set once, as the tiles' entries in lists.halves say.
inline void halve_sets(int size, int tile_columns, KeyLists& lists) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < size; i += kSortThreads) {
    const Half half = lists.halves[i / tile_columns];
    lists.to_right[lists.list(half.by_first)[i]] = i >= half.middle;
  }
  __syncthreads();
  int number[kThreadKeys] = {};
  for (int k = 0; k < kThreadKeys; ++k) {
    const int i = k * kSortThreads + thread;
    bool left = false;
    if (i < size) {
      const Half half = lists.halves[i / tile_columns];
      number[k] = lists.list(!half.by_first)[i];
      left = !lists.to_right[number[k]];
    }
    const uint32_t word = __ballot_sync(kWholeWarp, left);
    if (thread % 32 == 0) lists.left[i / 32] = word;
  }
  __syncthreads();
  for (int word = thread / 32; word < kListWords; word += kSortWarps) {
    int before = 0;
    for (int other = thread % 32; other < word; other += 32) before += __popc(lists.left[other]);
    before = __reduce_add_sync(kWholeWarp, before);
    if (thread % 32 == 0) lists.left_before[word] = before;
  }
  __syncthreads();
  for (int k = 0; k < kThreadKeys; ++k) {
    const int i = k * kSortThreads + thread;
    if (i >= size) continue;
    const Half half = lists.halves[i / tile_columns];
    const int lefts = left_before(lists, i) - left_before(lists, half.begin);
    const int to =
        lists.to_right[number[k]] ? half.middle + (i - half.begin - lefts) : half.begin + lefts;
    lists.list(!half.by_first)[to] = static_cast<uint16_t>(number[k]);
  }
  __syncthreads();
}

inline void halve_groups(const KeyOrderParams& params) {
  __shared__ union {
    DigitCounts digits;
    KeyLists lists;
  } shared;
  KeyLists& lists = shared.lists;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t keys = params.program.kv_len;
  const int group = static_cast<int>(blockIdx.x % params.most_groups);
  const int64_t place = blockIdx.x / params.most_groups;
  const int columns = params.tile_columns;
  const int seen_keys = params.seen_keys[place];
  if (group >= rules::group_count(seen_keys, columns)) return;
  const int begin = rules::group_begin(seen_keys, columns, group);
  const int size = rules::group_begin(seen_keys, columns, group + 1) - begin;
  const rules::KeyRows* seen = params.seen + place * keys;
  uint64_t* items = params.items + place * 2 * keys + begin;
  int32_t* key_of = params.order + place * keys + begin;  // of a number

  for (int i = thread; i < size; i += kSortThreads) {
    const auto key = static_cast<int32_t>(items[i] & kKeyMask);
    key_of[i] = key;
    items[i] = item_of(seen[key].last, i);
  }
  __syncthreads();
  const uint64_t* sorted =
      sort_items(items, items + keys, size, bits_of(params.program.q_len), shared.digits);
  for (int i = thread; i < size; i += kSortThreads) {
    lists.by_first[i] = static_cast<uint16_t>(i);
    lists.by_last[i] = static_cast<uint16_t>(sorted[i] & kKeyMask);
  }
  __syncthreads();

  const int tiles = rules::tile_count(size, columns);
  int first_tile = 0, end_tile = tiles;  // of the set that tile number `thread` lies in
  for (int most_tiles = tiles;; most_tiles = (most_tiles + 1) / 2) {
    if (thread < tiles) {
      const int middle_tile = rules::middle_tile(first_tile, end_tile);
      const int first = first_tile * columns;
      const int last = rules::min_of(end_tile * columns, size) - 1;
      const auto rows = [&](int number) { return seen[key_of[number]]; };
      const rules::KeyRows least = {rows(lists.by_first[first]).first,
                                    rows(lists.by_last[first]).last};
      const rules::KeyRows greatest = {rows(lists.by_first[last]).first,
                                       rows(lists.by_last[last]).last};
      const int middle = end_tile - first_tile > 1 ? middle_tile * columns : last + 1;
      lists.halves[thread] = {static_cast<int16_t>(first), static_cast<int16_t>(middle),
                              rules::halves_by_first(least, greatest)};
      (thread < middle_tile ? end_tile : first_tile) = middle_tile;
    }
    __syncthreads();
    if (most_tiles == 1) break;
    halve_sets(size, columns, lists);
  }
  int32_t key[kThreadKeys] = {};
  for (int k = 0; k < kThreadKeys; ++k) {
    const int i = k * kSortThreads + thread;
    if (i < size) key[k] = key_of[lists.list(lists.halves[i / columns].by_first)[i]];
  }
  __syncthreads();
  for (int k = 0; k < kThreadKeys; ++k) {
    const int i = k * kSortThreads + thread;
    if (i < size) key_of[i] = key[k];
  }
}

}  // namespace anymask::cuda
