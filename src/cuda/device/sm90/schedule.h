// Which work a block does: items from a counter, and the visible key tiles of an item.
#pragma once

#include "cuda/device/sm90/forward_config.h"
#include "cuda/device/sm90/forward_shared.h"
#include "cuda/device/sm90/mask_place.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

// The row of the tile map's arrays that belongs to a row tile.
__device__ __forceinline__ int64_t map_row(const ForwardParams& p, rules::Place place,
                                           int row_tile) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * p.map.outer_tiles +
         row_tile;
}

// Where an array of 4- or 8-byte integers begins for a place.
__device__ __forceinline__ const void* integers_at(const rules::Array& array, rules::Place place) {
  const int head = array.head_divisor == 1 ? place.head : place.head / array.head_divisor;
  return static_cast<const uint8_t*>(array.data) +
         (place.batch * array.batch_stride + head * array.head_stride) * array.bytes;
}

// Position in the plan -> the caller's key, for a place; null where keys stay as they come.
__device__ __forceinline__ const int32_t* key_order_of(const rules::Program& program,
                                                       rules::Place place) {
  if (program.key_order == nullptr) return nullptr;
  const int64_t row = int64_t{place.batch} * (program.heads / program.order_divisor) +
                      place.head / program.order_divisor;
  return program.key_order + row * program.kv_len;
}

// Words and ids are not looked at under MaskPath::kRuns.
template <MaskPath kPath>
__device__ __forceinline__ RecipeArrays recipe_arrays(const ForwardParams& p, rules::Place place) {
  const rules::Program& program = p.program;
  RecipeArrays arrays{};
  arrays.prefix = 0x7fffffff;
  arrays.key_order = key_order_of(program, place);
  if (p.recipe.intervals >= 0) {
    arrays.intervals = rules::array_at<int32_t>(program.nodes[p.recipe.intervals].columns, place);
  }
  if (p.recipe.segments >= 0) {
    arrays.segments = integers_at(program.nodes[p.recipe.segments].columns, place);
  }
  if (p.recipe.prefix >= 0) {
    arrays.prefix = rules::prefix_length(program.nodes[p.recipe.prefix], place);
  }
  if constexpr (kPath == MaskPath::kRuns) return arrays;
  if (p.recipe.ids >= 0) {
    arrays.row_ids = integers_at(program.nodes[p.recipe.ids].rows, place);
    arrays.column_ids = integers_at(program.nodes[p.recipe.ids].columns, place);
  }
  if (p.recipe.bits >= 0) {
    arrays.bits = rules::array_at<uint32_t>(program.nodes[p.recipe.bits].columns, place);
  }
  return arrays;
}

// Of an item that has kRows row tiles of the map: those key tiles that any of them sees.
template <int kRows>
__device__ __forceinline__ int count_union(const ForwardParams& p, int64_t first_row, int rows) {
  const uint32_t* visible = p.map.visible + first_row * p.map.words;
  int count = 0;
  for (int word = 0; word < p.map.words; ++word) {
    uint32_t tiles = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) tiles |= visible[r * p.map.words + word];
    }
    count += __popc(tiles);
  }
  return count;
}

// Items in this order: chunks of (batch, head) pairs one after the other, so that the K and V of a
// chunk stay in L2; inside a chunk the longest row tiles of all its pairs first, or (where items
// have several) the last.
template <ForwardConfig C>
__device__ __forceinline__ Item item_at(const ForwardParams& p, int index) {
  constexpr int kRows = C.map_rows();
  const int rows = (p.map.outer_tiles + kRows - 1) / kRows;
  const int chunk = index / (p.chunk * rows);
  const int first_pair = chunk * p.chunk;
  const int pairs = rules::min_of(p.chunk, p.pairs - first_pair);
  const int rest = index - first_pair * rows;
  const int rank = rest / pairs;
  const int pair = first_pair + rest - rank * pairs;
  Item item;
  item.batch = pair / p.q_heads;
  item.head = pair - item.batch * p.q_heads;
  if (C.has(kBias) && p.scores.bias.batch_stride == 0) {
    // Batch entries that share a bias of pairs run side by side: so it is read from memory once.
    const int batches = p.pairs / p.q_heads, of_group = pair / p.group_heads;
    const int kv_head = of_group / batches;
    item.batch = of_group - kv_head * batches;
    item.head = kv_head * p.group_heads + pair - of_group * p.group_heads;
  }
  const int64_t first = map_row(p, mask_place(p, item.batch, item.head), 0);
  if constexpr (kRows > 1) {
    item.row_tile = rows - 1 - rank;
    const int row = kRows * item.row_tile;
    item.count = count_union<kRows>(p, first + row, p.map.outer_tiles - row);
  } else {
    item.row_tile = p.map.order[first + rank];
    item.count = p.map.count[first + item.row_tile];
  }
  return item;
}

// Calls of few row tiles: what a block has of the line in which key_cuts.h lays them. Of the
// loading warp, which calls all of it converged.
template <ForwardConfig C>
struct PartList {
  const ForwardParams& p;
  int32_t* const starts;  // [p.items + 1], in shared memory: where in the line row tiles begin
  const int lane;

  int share = 0;
  int row_tile = 0;  // of p.items: the next one that may have a part here

  __device__ __forceinline__ Item item_of(int index) const {
    const int pair = index / p.map.outer_tiles;
    const int batch = pair / p.q_heads;
    return {index - pair * p.map.outer_tiles, batch, pair - batch * p.q_heads, 0};
  }

  // Key tiles that a row tile sees.
  __device__ __forceinline__ int count_of(int index) const {
    return starts[index + 1] - starts[index] - kPartOverhead;
  }

  __device__ __forceinline__ RowCuts cuts(int index) const {
    return cuts_of(starts[index], count_of(index), share, p.blocks);
  }

  // In the line; 0 behind its end.
  __device__ __forceinline__ int length_of(int index) const {
    if (index >= p.items) return 0;
    const Item item = item_of(index);
    const rules::Place place = mask_place(p, item.batch, item.head);
    return p.map.count[map_row(p, place, item.row_tile)] + kPartOverhead;
  }

  __device__ __forceinline__ void begin() {
    constexpr unsigned kAll = 0xffffffffu;
    int units = 0, longest = 0;
    int next_length = length_of(lane);
#pragma unroll 1
    for (int base = 0; base < p.items; base += 32) {
      const int index = base + lane;
      const int length = next_length;
      next_length = length_of(index + 32);  // asked for early: many row tiles, many trips to memory
      int end = length;                     // of this row tile, from the first of the 32 on
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kAll, end, step);
        if (lane >= step) end += before;
      }
      if (index < p.items) starts[index] = units + end - length;
      units += __shfl_sync(kAll, end, 31);
      longest = rules::max_of(longest, __reduce_max_sync(kAll, length));
    }
    if (lane == 0) starts[p.items] = units;
    __syncwarp();
    share = share_of(units, longest, p.items, p.blocks);
    const int block = blockIdx.x;
    if (share == 0) {
      row_tile = block;
      return;
    }
#pragma unroll 1
    for (int base = 0; base < p.items; base += 32) {  // those whose last part is with one before
      const int index = base + lane;
      bool before = false;
      if (index < p.items) {
        const RowCuts row = cuts(index);
        before = row.first_block + row.parts - 1 < block;
      }
      row_tile += __popc(__ballot_sync(kAll, before));
    }
  }

  // The block's next part; item.count < 0: there is none.
  __device__ __forceinline__ Item next(RowPart& part) {
    const Item none = {0, 0, 0, -1};
    if (row_tile >= p.items) return none;
    Item item = item_of(row_tile);
    item.count = count_of(row_tile);
    part = {row_tile, 0, 1, 0, 0};
    if (share == 0) {
      row_tile = p.items;
      return item;
    }
    const int block = blockIdx.x, start = starts[row_tile];
    const RowCuts row = cuts(row_tile);
    if (row.first_block > block) return none;
    const int index = block - row.first_block;
    part = {row_tile, row.first_block, row.parts, index, row.begin_of(index, start, share)};
    if (index + 1 < row.parts) item.count = row.begin_of(index + 1, start, share);
    item.count -= part.first_tile;
    ++row_tile;
    return item;
  }
};

// The visible tiles of an item in ascending order, walked by a converged warp: all lanes read the
// same word, and 32 words share a cache line. Where an item has several row tiles of the map, a
// tile is partial also if only some of them see it.
template <ForwardConfig C>
struct TileWalker {
  static constexpr int kRows = C.map_rows();
  const ForwardParams& p;
  const uint32_t* visible;
  int rows;       // how many of kRows there are
  int word = -1;  // the word being walked, what is left of it, and its partial tiles
  uint32_t tiles = 0, partial = 0;

  // The current tile.
  int tile = 0;
  bool is_partial = false;

  // place: of the item's head; first_tile: where it begins, if row tiles are cut.
  __device__ __forceinline__ TileWalker(const ForwardParams& params, const Item& item,
                                        rules::Place place, int first_tile = 0)
      : p(params),
        visible(p.map.visible + map_row(p, place, kRows * item.row_tile) * p.map.words),
        rows(rules::min_of(kRows, p.map.outer_tiles - kRows * item.row_tile)) {
    if constexpr (C.cuts != 0) skip(first_tile);
  }

  // To the next word that has a visible tile, unless this one has.
  __device__ __forceinline__ void find_word() {
    while (tiles == 0) {
      ++word;
      const uint32_t* const hidden = visible + (p.map.hidden - p.map.visible);
      tiles = visible[word];
      partial = hidden[word];
      uint32_t all = tiles;
#pragma unroll
      for (int r = 1; r < kRows; ++r) {
        if (r >= rows) break;
        const uint32_t more = visible[r * p.map.words + word];
        tiles |= more;
        all &= more;
        partial |= hidden[r * p.map.words + word];
      }
      partial |= tiles & ~all;
    }
  }

  // Past visible tiles, of which there are more.
  __device__ __forceinline__ void skip(int count) {
    while (count > 0) {
      find_word();
      const int here = __popc(tiles);
      if (here <= count) {
        tiles = 0;
        count -= here;
      } else {
        for (; count > 0; --count) tiles &= tiles - 1;
      }
    }
  }

  // Called item.count times.
  __device__ __forceinline__ void next() {
    find_word();
    const int bit = __ffs(tiles) - 1;
    tiles &= tiles - 1;
    tile = word * 32 + bit;
    is_partial = ((partial >> bit) & 1) != 0;
  }
};

}  // namespace anymask::cuda
