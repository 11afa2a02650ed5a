// Dynamic masks: for each key the row from which on it is hidden, because `keep` better keys came.
//
// Query row i sees keys 0 .. i + kv_len - q_len and keeps the best of them. Number keys by rank: by
// falling score, equal scores by rising index. Key j is hidden once the keys seen hold j and `keep`
// better ones, so from key e = max(j, the keep-th smallest index among the keys of lower rank) on;
// with fewer than `keep` of these it is never hidden. Write p(r) for the keep-th smallest index
// among the keys of ranks 0 .. r - 1, for r >= keep. One more key in that set, of rank r and index
// x, changes nothing below it: if x > p(r) the keep-th smallest stays, p(r + 1) = p(r); if x < p(r)
// it becomes the next smaller index of the set with x, which may be x itself. So p only moves left,
// over set bits of a bitmap of indices, and moves at most once a rank.
//
// `count_keys` and `place_keys` sort the keys by rank, over as many blocks as there are tiles.
// `find_ends` cuts the ranks into chunks of consecutive ranks that are walked side by side: p at a
// chunk's start is a count over the keys of lower rank, and of the bitmap no more is needed than
// the few set bits left of it that the chunk can reach, so memory does not depend on kv_len.
#pragma once

#include "cuda/device/radix_sort.h"
#include "cuda/device/top_keys_params.h"

namespace anymask::cuda {

// ---- ranks: a radix sort over many blocks -------------------------------------------------------

// The order of floats as unsigned integers, best first: negative ones flipped, -0 equal to 0, NaN
// last.
inline uint32_t descending(float score) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return score != score ? ~0u : ~ascending;
}

// One block's part of a pass. An item is a score above 32 bits and a key below.
struct SortTile {
  int64_t place, first;  // first key or item of the tile
  int count;
  int shift;

  explicit SortTile(const TopKeysParams& params) {
    place = blockIdx.x / params.tiles;
    first = static_cast<int64_t>(blockIdx.x % params.tiles) * kTileKeys;
    const int64_t rest = params.kv_len - first;
    count = rest < kTileKeys ? static_cast<int>(rest) : kTileKeys;
    shift = 32 + 8 * params.pass;
  }

  uint64_t item(const TopKeysParams& params, int i) const {
    const int64_t key = first + i;
    if (params.pass > 0) return params.from[place * params.kv_len + key];
    const float score =
        params.scores[place / params.heads * params.batch_stride +
                      place % params.heads * params.head_stride + key * params.key_stride];
    return static_cast<uint64_t>(descending(score)) << 32 | static_cast<uint64_t>(key);
  }
};

inline void count_keys(const TopKeysParams& params) {
  __shared__ int32_t counts[kDigits];
  const int thread = static_cast<int>(threadIdx.x);
  const SortTile tile(params);
  if (thread < kDigits) counts[thread] = 0;
  __syncthreads();
  for (int i = thread; i < tile.count; i += kSortThreads) {
    atomicAdd(&counts[tile.item(params, i) >> tile.shift & (kDigits - 1)], 1);
  }
  __syncthreads();
  if (thread < kDigits) {
    params.counts[static_cast<int64_t>(blockIdx.x) * kDigits + thread] = counts[thread];
  }
}

inline void place_keys(const TopKeysParams& params) {
  __shared__ DigitCounts digits;
  const int thread = static_cast<int>(threadIdx.x);
  const SortTile tile(params);
  const auto load = [&](int i) { return tile.item(params, i); };
  count_digits(load, tile.count, tile.shift, digits);

  int before = 0;
  if (thread < kDigits) {
    const int32_t* counts = params.counts + tile.place * params.tiles * kDigits + thread;
    const int own = static_cast<int>(blockIdx.x % params.tiles);
    int total = 0;
    for (int i = 0; i < params.tiles; ++i) {
      if (i == own) before = total;
      total += counts[static_cast<int64_t>(i) * kDigits];
    }
    digits.total[thread] = total;
  }
  __syncthreads();

  const int64_t base = tile.place * params.kv_len;
  const bool last = params.pass == kSortPasses - 1;
  place_digits(load, tile.count, tile.shift, digits, digits.total, before,
               [&](uint64_t item, int position) {
                 if (!last) {
                   params.to[base + position] = item;
                   return;
                 }
                 const auto key = static_cast<int32_t>(item);
                 params.order[base + position] = key;
                 params.rank[base + key] = position;
                 if (position < params.keep) params.ends[base + key] = params.q_len;
               });
}

// ---- ends: chunks of ranks, a warp each ---------------------------------------------------------

// The keys from p to the left that are in the set when a chunk starts or come in during it, packed:
// a spot each, spot 0 is p. Looked for 256 at a time until the set's are one more than the chunk's
// keys, so that p cannot run out of them.
inline constexpr int kLookKeys = 256;
inline constexpr int kSpots = 2 * kChunkKeys + kLookKeys;
static_assert(kSpots <= 32 * 32, "a bit each in the lanes of a warp");
// Spots of the chunk's keys that have none.
inline constexpr int kRightOfAll = 0;
inline constexpr int kLeftOfAll = 32 * 32;

struct EndsWarp {
  int32_t key[kSpots];       // of a spot
  int32_t spot[kChunkKeys];  // of a chunk's key
  bool in_set[kSpots];       // a spot's key is when the chunk starts
};

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// p(r): the keep-th smallest key among those of ranks below r; -1 if keep is 0.
inline int first_pointer(const int32_t* rank, int r, int keep, int kv_len) {
  constexpr int kLoads = 16;  // on the way at once
  const int lane = static_cast<int>(threadIdx.x % 32);
  int missing = keep;
  for (int start = 0; missing > 0 && start < kv_len; start += 32 * kLoads) {
    int ranks[kLoads];
    for (int i = 0; i < kLoads; ++i) {
      const int key = start + 32 * i + lane;
      ranks[i] = key < kv_len ? rank[key] : r;
    }
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t better = __ballot_sync(kAllLanes, ranks[i] < r);
      const int count = __popc(better);
      if (missing <= count) {
        const bool me =
            (better >> lane & 1) != 0 && __popc(better & rules::low_bits(lane)) == missing - 1;
        return start + 32 * i + __ffs(static_cast<int>(__ballot_sync(kAllLanes, me))) - 1;
      }
      missing -= count;
    }
  }
  return -1;
}

// Fills spots and returns this lane's word of the bitmap: bit s % 32 of lane s / 32 says that the
// key of spot s > 0 is in the set.
inline uint32_t look_left(const int32_t* order, const int32_t* rank, int begin, int count,
                          int pointer, EndsWarp& warp) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = lane; i < count; i += 32) {
    warp.spot[i] = order[begin + i] > pointer ? kRightOfAll : kLeftOfAll;
  }
  __syncwarp();
  int spots = 0;
  for (int right = pointer, better = 0; right >= 0 && better <= count; right -= kLookKeys) {
    int ranks[kLookKeys / 32];
    for (int i = 0; i < kLookKeys / 32; ++i) {
      const int key = right - 32 * i - lane;
      ranks[i] = key >= 0 ? rank[key] : begin + count;
    }
    for (int i = 0; i < kLookKeys / 32; ++i) {
      const uint32_t taken = __ballot_sync(kAllLanes, ranks[i] < begin + count);
      const uint32_t in_set = __ballot_sync(kAllLanes, ranks[i] < begin);
      if ((taken >> lane & 1) != 0) {
        const int spot = spots + __popc(taken & rules::low_bits(lane));
        warp.key[spot] = right - 32 * i - lane;
        warp.in_set[spot] = (in_set >> lane & 1) != 0;
        if (ranks[i] >= begin) warp.spot[ranks[i] - begin] = spot;
      }
      spots += __popc(taken);
      better += __popc(in_set);
    }
  }
  __syncwarp();
  uint32_t word = 0;
  for (int i = 0; 32 * i < spots; ++i) {
    const int spot = 32 * i + lane;
    const uint32_t bits = __ballot_sync(kAllLanes, 0 < spot && spot < spots && warp.in_set[spot]);
    if (lane == i) word = bits;
  }
  return word;
}

// Walks one chunk: p goes from `pointer`, p(begin), to what is returned, p(begin + count).
inline int walk(const TopKeysParams& params, const int32_t* order, const int32_t* rank,
                int32_t* ends, int begin, int count, int pointer, EndsWarp& warp) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t word = look_left(order, rank, begin, count, pointer, warp);
  int at = 0;  // the pointer's spot
  for (int first = 0; first < count; first += 32) {
    const bool real = first + lane < count;
    const int key = real ? order[begin + first + lane] : 0;
    const int spot = real ? warp.spot[first + lane] : kRightOfAll;
    int seen = pointer;  // what it is when this lane's key comes
    uint32_t movers = __ballot_sync(kAllLanes, spot > at);
    for (; movers != 0; movers &= movers - 1) {
      const int mover = __ffs(static_cast<int>(movers)) - 1;
      const int in = __shfl_sync(kAllLanes, spot, mover);
      if (in <= at) continue;  // the pointer has moved past it
      if (lane == in / 32) word |= 1u << in % 32;
      const int next = __ffs(static_cast<int>(__ballot_sync(kAllLanes, word != 0))) - 1;
      at = 32 * next + __ffs(static_cast<int>(__shfl_sync(kAllLanes, word, next))) - 1;
      if (lane == next) word &= word - 1;
      pointer = warp.key[at];
      if (lane > mover) seen = pointer;
    }
    const int end = rules::max_of(key, seen) - (params.kv_len - params.q_len);
    if (real) ends[key] = rules::max_of(end, 0);
  }
  __syncwarp();
  return pointer;
}

inline void find_ends(const TopKeysParams& params) {
  __shared__ EndsWarp warps[kEndsWarps];
  EndsWarp& warp = warps[threadIdx.x / 32];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kEndsWarps + threadIdx.x / 32;
  const int64_t offset = index / params.warps * params.kv_len;
  if (index / params.warps >= params.places) return;
  const int32_t* order = params.order + offset;
  const int32_t* rank = params.rank + offset;
  int32_t* ends = params.ends + offset;

  const int64_t keys = static_cast<int64_t>(params.warp_chunks) * kChunkKeys;
  const int64_t first = params.keep + index % params.warps * keys;
  if (first >= params.kv_len) return;
  const int64_t end = first + keys < params.kv_len ? first + keys : params.kv_len;
  int pointer = first_pointer(rank, static_cast<int>(first), params.keep, params.kv_len);
  for (int64_t begin = first; begin < end; begin += kChunkKeys) {
    const int count = static_cast<int>(end - begin < kChunkKeys ? end - begin : kChunkKeys);
    pointer = walk(params, order, rank, ends, static_cast<int>(begin), count, pointer, warp);
  }
}

}  // namespace anymask::cuda
