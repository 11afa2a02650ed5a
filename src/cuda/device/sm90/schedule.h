// Which work a block does: items from a counter, and the visible key tiles of an item.
#pragma once

#include "cuda/device/sm90/forward_config.h"
#include "cuda/device/sm90/forward_shared.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

__device__ __forceinline__ rules::Place mask_place(const ForwardParams& p, int batch, int head) {
  return {p.program.batches == 1 ? 0 : batch, head / (p.q_heads / p.program.heads)};
}

// The row of the tile map's arrays that belongs to a row tile.
__device__ __forceinline__ int64_t map_row(const ForwardParams& p, rules::Place place,
                                           int row_tile) {
  return (static_cast<int64_t>(place.batch) * p.program.heads + place.head) * p.map.outer_tiles +
         row_tile;
}

// Where an array of 4- or 8-byte integers begins for a place.
__device__ __forceinline__ const void* integers_at(const rules::Array& array, rules::Place place) {
  if (array.bytes == 8) return rules::array_at<int64_t>(array, place);
  return rules::array_at<int32_t>(array, place);
}

__device__ __forceinline__ RecipeArrays recipe_arrays(const ForwardParams& p, const Item& item) {
  const rules::Program& program = p.program;
  const rules::Place place = mask_place(p, item.batch, item.head);
  RecipeArrays arrays{};
  arrays.prefix = 0x7fffffff;
  if (program.key_order != nullptr) {
    const int64_t row = int64_t{place.batch} * (program.heads / program.order_divisor) +
                        place.head / program.order_divisor;
    arrays.key_order = program.key_order + row * program.kv_len;
  }
  if (p.recipe.intervals >= 0) {
    arrays.intervals =
        rules::array_at<int32_t>(program.nodes[p.recipe.intervals].columns, place);
  }
  if (p.recipe.segments >= 0) {
    arrays.segments = integers_at(program.nodes[p.recipe.segments].columns, place);
  }
  if (p.recipe.ids >= 0) {
    arrays.row_ids = integers_at(program.nodes[p.recipe.ids].rows, place);
    arrays.column_ids = integers_at(program.nodes[p.recipe.ids].columns, place);
  }
  if (p.recipe.bits >= 0) {
    arrays.bits = rules::array_at<uint32_t>(program.nodes[p.recipe.bits].columns, place);
  }
  if (p.recipe.prefix >= 0) {
    arrays.prefix = rules::prefix_length(program.nodes[p.recipe.prefix], place);
  }
  return arrays;
}

// Items in this order: chunks of (batch, head) pairs one after the other, so that the K and V of a
// chunk stay in L2; inside a chunk the longest row tiles of all its pairs first.
template <ForwardConfig C>
__device__ __forceinline__ Item item_at(const ForwardParams& p, int index) {
  const int rows = p.map.outer_tiles;
  const int chunk = index / (p.chunk * rows);
  const int first_pair = chunk * p.chunk;
  const int pairs = rules::min_of(p.chunk, p.pairs - first_pair);
  const int rest = index - first_pair * rows;
  const int rank = rest / pairs;
  const int pair = first_pair + rest - rank * pairs;
  Item item;
  item.batch = pair / p.q_heads;
  item.head = pair - item.batch * p.q_heads;
  const int64_t first = map_row(p, mask_place(p, item.batch, item.head), 0);
  item.row_tile = p.map.order[first + rank];
  item.count = (p.map.count[first + item.row_tile] + C.tiles - 1) / C.tiles;
  return item;
}

// The steps of an item in ascending order, walked by a converged warp. A step is C.tiles visible
// tiles; where only one is left, the second is the one beyond the last, which reads as zeros and is
// hidden.
template <ForwardConfig C>
struct StepWalker {
  const ForwardParams& p;
  const uint32_t* visible;
  const uint32_t* hidden;
  const int lane;

  int base = -32;  // each lane holds one word of the 32 from here on
  uint32_t my_visible = 0, my_hidden = 0;
  uint32_t owners = 0;              // lanes whose words are still to be walked
  int word = 0;                     // the word being walked,
  uint32_t tiles = 0, partial = 0;  // what is left of it, and which of its tiles are partial

  // The current step.
  int first = 0, second = 0;
  bool needs_bits = false;

  __device__ __forceinline__ StepWalker(const ForwardParams& params, const Item& item, int my_lane)
      : p(params), lane(my_lane) {
    const int64_t row = map_row(p, mask_place(p, item.batch, item.head), item.row_tile);
    visible = p.map.visible + row * p.map.words;
    hidden = p.map.hidden + row * p.map.words;
  }

  // The next visible tile; p.map.inner_tiles, partial, when there is none.
  __device__ __forceinline__ int next_tile() {
    while (tiles == 0) {
      while (owners == 0) {
        base += 32;
        if (base >= p.map.words) {
          needs_bits = true;
          return p.map.inner_tiles;
        }
        const bool inside = base + lane < p.map.words;
        my_visible = inside ? visible[base + lane] : 0;
        my_hidden = inside ? hidden[base + lane] : 0;
        owners = __ballot_sync(0xffffffffu, my_visible != 0);
      }
      const int owner = __ffs(owners) - 1;
      owners &= owners - 1;
      word = base + owner;
      tiles = __shfl_sync(0xffffffffu, my_visible, owner);
      partial = __shfl_sync(0xffffffffu, my_hidden, owner);
    }
    const int bit = __ffs(tiles) - 1;
    tiles &= tiles - 1;
    needs_bits |= ((partial >> bit) & 1) != 0;
    return word * 32 + bit;
  }

  // Called item.count times.
  __device__ __forceinline__ void next() {
    needs_bits = false;
    first = next_tile();
    second = C.tiles == 2 ? next_tile() : first;
  }
};

}  // namespace anymask::cuda
