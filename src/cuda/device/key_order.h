// Orders the keys of a scattered mask so that similar columns share tiles: keys that some row sees
// come first, in groups by first row, each group sorted by last row. The CPU's order exactly.
//
// `see_keys` finds the first and last row of every key. `sort_keys` sorts by first row, one block a
// place; under a causal mask keys come sorted and it only looks. `group_keys` sorts by last row,
// one block a group.
#pragma once

#include "cuda/device/plan_params.h"
#include "cuda/device/radix_sort.h"
#include "rules/key_rows.h"

namespace anymask::cuda {

// ---- what sees a key ----------------------------------------------------------------------------

inline void see_keys(const KeyOrderParams& params) {
  const rules::Program& program = params.program;
  const int key_block = static_cast<int>(blockIdx.x % params.key_blocks);
  const int order = static_cast<int>(blockIdx.x / params.key_blocks);
  const int key = key_block * kSeeThreads + static_cast<int>(threadIdx.x);
  if (key >= program.kv_len) return;
  const int orders = program.heads / program.order_divisor;
  params.seen[int64_t{order} * program.kv_len + key] =
      rules::rows_of_order(program, order / orders, order % orders, key);
}

// ---- a stable radix sort by one block -----------------------------------------------------------
//
// An item is a value above kKeyBits and a key below.

inline constexpr int kKeyBits = 30;
inline constexpr uint64_t kKeyMask = (uint64_t{1} << kKeyBits) - 1;

struct SortBlock {
  DigitCounts digits;
  int32_t seen_keys;
  int32_t unsorted;
};

inline void sort_digit(const uint64_t* from, uint64_t* to, int count, int shift,
                       DigitCounts& digits) {
  const auto load = [from](int i) { return from[i]; };
  count_digits(load, count, shift, digits);
  place_digits(load, count, shift, digits, digits.total, 0,
               [to](uint64_t item, int position) { to[position] = item; });
}

// Sorts by the lowest `bits` of the values; returns where the result is.
inline uint64_t* sort_items(uint64_t* items, uint64_t* other, int count, int bits,
                            SortBlock& block) {
  for (int bit = 0; bit < bits; bit += 8) {
    sort_digit(items, other, count, kKeyBits + bit, block.digits);
    uint64_t* const sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

inline int bits_of(int value) { return value > 0 ? 32 - __clz(value) : 1; }

// ---- the two sorts ------------------------------------------------------------------------------

inline uint64_t item_of(int32_t value, uint64_t key) {
  return static_cast<uint64_t>(value) << kKeyBits | key;
}

inline void sort_keys(const KeyOrderParams& params) {
  __shared__ SortBlock block;
  const int thread = static_cast<int>(threadIdx.x);
  const int keys = params.program.kv_len;
  const int64_t place = blockIdx.x;
  const rules::KeyRows* seen = params.seen + place * keys;
  uint64_t* items = params.items + place * 2 * keys;

  if (thread == 0) block.seen_keys = block.unsorted = 0;
  __syncthreads();
  for (int key = thread; key < keys; key += kSortThreads) {
    items[key] = item_of(seen[key].first, static_cast<uint64_t>(key));
    if (seen[key].last > 0) atomicAdd(&block.seen_keys, 1);
    if (key > 0 && seen[key - 1].first > seen[key].first) block.unsorted = 1;
  }
  __syncthreads();
  if (thread == 0) params.seen_keys[place] = block.seen_keys;
  if (block.unsorted == 0) return;
  const uint64_t* sorted =
      sort_items(items, items + keys, keys, bits_of(params.program.q_len), block);
  if (sorted == items) return;
  for (int i = thread; i < keys; i += kSortThreads) items[i] = sorted[i];
}

inline void group_keys(const KeyOrderParams& params) {
  __shared__ SortBlock block;
  const int thread = static_cast<int>(threadIdx.x);
  const int keys = params.program.kv_len;
  const int group = static_cast<int>(blockIdx.x % (params.most_groups + 1));
  const int64_t place = blockIdx.x / (params.most_groups + 1);
  const rules::KeyRows* seen = params.seen + place * keys;
  uint64_t* items = params.items + place * 2 * keys;
  int32_t* order = params.order + place * keys;

  const int64_t count = params.seen_keys[place];
  const int groups = rules::group_count(static_cast<int>(count), params.tile_columns);
  if (group == params.most_groups) {  // the last block copies what nobody sees
    for (int i = static_cast<int>(count) + thread; i < keys; i += kSortThreads) {
      order[i] = static_cast<int32_t>(items[i] & kKeyMask);
    }
    return;
  }
  if (group >= groups) return;
  const int begin = static_cast<int>(count * group / groups);
  const int size = static_cast<int>(count * (group + 1) / groups) - begin;
  for (int i = begin + thread; i < begin + size; i += kSortThreads) {
    const uint64_t key = items[i] & kKeyMask;
    items[i] = item_of(seen[key].last, key);
  }
  __syncthreads();
  const uint64_t* sorted =
      sort_items(items + begin, items + keys + begin, size, bits_of(params.program.q_len), block);
  for (int i = thread; i < size; i += kSortThreads) {
    order[begin + i] = static_cast<int32_t>(sorted[i] & kKeyMask);
  }
}

}  // namespace anymask::cuda
