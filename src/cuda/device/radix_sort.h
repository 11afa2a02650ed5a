// The sweeps of a stable radix sort, for one block's items: each warp owns a run of them. One sweep
// counts the warps' digits, the block turns counts into positions, a second sweep puts the items
// there in order. `load(i)` is item i, an unsigned integer; it is asked ahead of its use.
#pragma once

#include "cuda/device/radix_sort_params.h"

namespace anymask::cuda {

struct DigitCounts {
  int32_t position[kSortWarps][kDigits];  // counts, then where a warp's next item of a digit goes
  int32_t total[kDigits];                 // of the block
};

// Walks this warp's run of items, 32 at a time: use(item, position), where the counter of the
// item's digit tells the position and moves on.
template <typename Load, typename Use>
inline void for_each_item(Load load, int count, int shift, DigitCounts& counts, Use use) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int run = (count + kSortWarps - 1) / kSortWarps;
  const int begin = rules::min_of(warp * run, count);
  const int end = rules::min_of(begin + run, count);
  uint64_t next = begin + lane < end ? load(begin + lane) : 0;
  for (int i = begin; i < end; i += 32) {
    const uint64_t item = next;
    const bool real = i + lane < end;
    if (i + 32 + lane < end) next = load(i + 32 + lane);
    const int digit = real ? static_cast<int>(item >> shift) & (kDigits - 1) : kDigits;
    const uint32_t peers = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(peers & rules::low_bits(lane));
    const int start = real ? counts.position[warp][digit] : 0;
    __syncwarp();
    if (real && rank == 0) counts.position[warp][digit] = start + __popc(peers);
    if (real) use(item, start + rank);
    __syncwarp();
  }
}

// Afterwards position[warp][digit] is how many items of the digit the warps before it have, and
// total[digit] how many the block has.
template <typename Load>
inline void count_digits(Load load, int count, int shift, DigitCounts& counts) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads) {
    counts.position[i / kDigits][i % kDigits] = 0;
  }
  __syncthreads();
  for_each_item(load, count, shift, counts, [](uint64_t, int) {});
  __syncthreads();
  if (thread < kDigits) {
    int sum = 0;
    for (int warp = 0; warp < kSortWarps; ++warp) {
      const int mine = counts.position[warp][thread];
      counts.position[warp][thread] = sum;
      sum += mine;
    }
    counts.total[thread] = sum;
  }
  __syncthreads();
}

// Puts every item where it belongs: place(item, position). The block's items of a digit start
// `before` places behind all items of smaller digits, of which there are totals[0] + totals[1] +
// ...; before and totals are those of this thread's digit and of all digits.
template <typename Load, typename Place>
inline void place_digits(Load load, int count, int shift, DigitCounts& counts,
                         const int32_t* totals, int before, Place place) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kDigits) {
    // The digits of smaller warps together, those of this warp one by one.
    const int own = thread / 32 * 32;
    int smaller = 0;
    for (int digit = thread % 32; digit < own; digit += 32) smaller += totals[digit];
    int start = before + __reduce_add_sync(0xffffffffu, smaller);
    for (int digit = own; digit < thread; ++digit) start += totals[digit];
    for (int warp = 0; warp < kSortWarps; ++warp) counts.position[warp][thread] += start;
  }
  __syncthreads();
  for_each_item(load, count, shift, counts, place);
  __syncthreads();
}

}  // namespace anymask::cuda
