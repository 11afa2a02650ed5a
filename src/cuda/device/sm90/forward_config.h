// The variants of the Hopper kernels that walk key tiles of a row tile, which are the forward
// kernel and the backward's where it makes dQ (backward_rows.h), and the forward kernel's one
// parameter. Host and device.
#pragma once

#include "cuda/device/key_cuts.h"
#include "cuda/device/ptx/element.h"
#include "cuda/device/score_params.h"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// How mask bits are made. Code for masks that a call does not have costs registers, and there are
// few: so each path is a variant.
enum class MaskPath : int32_t {
  kRuns,     // programs whose recipe is one run of rows per column
  kRecipe,   // any recipe
  kMachine,  // the postfix machine, for programs without a recipe
  kBaked,    // not at all: the plan has them (most programs with dense leaves)
};

// One variant. Integers only: the launcher hands them to the compiler as a list.
struct ForwardConfig {
  int32_t half;            // 1: fp16, 0: bf16
  int32_t depth;           // head dimension of q and k, padded: 64, 128, 192, 256
  int32_t value_depth;     // head dimension of v and out, padded likewise
  int32_t warpgroups;      // math warpgroups, 64 query rows each
  int32_t columns;         // keys of a tile, a multiple of 16
  int32_t k_stages;        // tiles of K in shared memory
  int32_t v_stages;        // and of V
  int32_t bit_slots;       // partial tiles whose bits are in shared memory
  int32_t overlap;         // 1: the next Q K^T runs under this softmax (needs registers for P)
  int32_t pieces;          // without overlap: P V is issued in this many pieces, as P is made
  int32_t mask_path;       // a MaskPath
  int32_t math_registers;  // of a thread, after the warpgroups have traded
  int32_t load_registers;
  int32_t features;  // score options: kSoftcap and so on
  int32_t gradient;  // 1: dQ is made; the map has a row tile for each warpgroup
  int32_t cuts;      // 1: a row tile's key tiles may be with several blocks (key_cuts.h)
  int32_t halves;    // 1: up to 16 query rows, of which each warpgroup has half of a tile's keys

  constexpr bool has(int32_t feature) const { return (features & feature) != 0; }
  // Whether the bit-making warps have something for every tile, not only for partial ones.
  constexpr bool every_tile() const { return has(kKeyBias | kDropout); }
  constexpr MaskPath masks() const { return static_cast<MaskPath>(mask_path); }
  constexpr bool baked() const { return masks() == MaskPath::kBaked; }
  // Whether those warps wait for a slot and announce it once a tile, or once every 32 columns.
  constexpr bool whole_slots() const { return every_tile() || baked(); }
  constexpr int rows() const { return 64 * warpgroups; }
  // Of 64 rows, that Q is loaded and bits are read for.
  constexpr int strips() const { return halves != 0 ? 1 : warpgroups; }
  // Row tiles of a call whose key tiles may be with several blocks.
  constexpr int most_cut() const { return halves != 0 ? kMostCutStrips : kMostCutRowTiles; }
  // Strips of 16 rows of a row tile, each of which is joined by itself.
  constexpr int joined_strips() const { return halves != 0 ? 1 : rows() / 16; }
  // Keys of a tile that one warpgroup has.
  constexpr int own_columns() const { return halves != 0 ? columns / warpgroups : columns; }
  // Row tiles of the map that an item has.
  constexpr int map_rows() const { return gradient != 0 ? warpgroups : 1; }
  constexpr plan::TileShape tile() const { return {rows(), columns}; }
  // A strip (the rows of one warpgroup) works on as few blocks of 64 columns of a partial tile as
  // it sees anything in; tiles of other widths are one block.
  constexpr int block_columns() const { return columns % 64 == 0 && !overlap ? 64 : columns; }
  constexpr int blocks() const { return columns / block_columns(); }
  constexpr int threads() const { return 128 * (warpgroups + 1); }
  // Words of mask bits per row: a word holds the 32 columns that one thread of a quad owns among
  // 128, so a wider tile has more than one group.
  constexpr int word_groups() const { return plan::groups_of(tile()); }
  // Sets of words in a slot of the ring of bits: the mask's, and of the pairs that dropout keeps.
  constexpr int word_sets() const { return has(kDropout) ? 2 : 1; }
  // Q, the rings of K and V, the ring of bits; then in whole KiB key biases, what a warp hands to
  // another, and barriers, classes and the like, which need less than 640 bytes.
  constexpr int shared_bytes() const {
    const int small = 640 + (has(kKeyBias) ? bit_slots * columns * 4 : 0) +
                      (cuts != 0 ? (most_cut() + 1) * 4 + 160 : 0) +
                      (halves != 0 ? 32 * (value_depth / 2 + 4) * 4 : 0);
    return 64 * strips() * depth * 2 + columns * (k_stages * depth + v_stages * value_depth) * 2 +
           bit_slots * word_sets() * warpgroups * word_groups() * 1024 +
           (small + 1023) / 1024 * 1024;
  }
};

// The driver's CUtensorMap.
struct alignas(64) TensorMapBytes {
  uint64_t opaque[16];
};

// A program that is a conjunction of column runs (bands, intervals, segments, prefixes) and at most
// one bitmap and one pair of ids needs no postfix machine: per column, three runs of rows say all
// but the bitmap and the ids. Indices are of program nodes, -1: none.
struct RunRecipe {
  int32_t usable;            // 0: the program needs the machine
  int32_t band_lo, band_hi;  // of all bands together
  int32_t intervals;
  int32_t segments;
  int32_t prefix;
  int32_t bits;
  int32_t ids;
  int32_t holes;  // runs of masked rows a column that bands and the like cannot express: 0, 1, 2
};

// The recipe of `program`, where it has one. Host only.
inline RunRecipe recipe_of(const rules::Program& program) {
  using rules::Op;
  constexpr int kFar = 1 << 30;
  RunRecipe recipe{1, -kFar, kFar, -1, -1, -1, -1, -1, 0};
  for (int i = 0; i < program.count; ++i) {
    const rules::Node& node = program.nodes[i];
    int32_t* slot = nullptr;
    switch (node.op) {
      case Op::kAnd:
        continue;
      case Op::kConstant:
        if (node.flag == 0) recipe.band_hi = -kFar, recipe.band_lo = kFar;
        continue;
      case Op::kBand:
        recipe.band_lo = rules::max_of(recipe.band_lo, node.lo);
        recipe.band_hi = rules::min_of(recipe.band_hi, node.hi);
        continue;
      case Op::kIntervals:
        slot = &recipe.intervals;
        break;
      case Op::kSegments:
        slot = &recipe.segments;
        break;
      case Op::kPrefix:
        slot = &recipe.prefix;
        break;
      case Op::kBits:
        slot = &recipe.bits;
        break;
      case Op::kIds:
        slot = &recipe.ids;
        break;
      default:
        break;
    }
    if (slot == nullptr || *slot >= 0) return RunRecipe{0, 0, 0, -1, -1, -1, -1, -1, 0};
    *slot = i;
  }
  if (recipe.intervals >= 0) {
    const auto form = static_cast<rules::IntervalForm>(program.nodes[recipe.intervals].flag);
    if (form == rules::IntervalForm::kRun) recipe.holes = 1;
    if (form == rules::IntervalForm::kTwoRuns) recipe.holes = 2;
  }
  return recipe;
}

// How a pass comes by the bits of a map's partial tiles. Host only.
inline MaskPath mask_path(const RunRecipe& recipe, const plan::TileMap& map) {
  if (map.baked != nullptr) return MaskPath::kBaked;
  if (recipe.usable == 0) return MaskPath::kMachine;
  const bool one_run = recipe.bits < 0 && recipe.ids < 0 && recipe.holes == 0;
  return one_run ? MaskPath::kRuns : MaskPath::kRecipe;
}

struct ForwardParams {
  TensorMapBytes q;  // dimensions: depth, length, heads, batch
  TensorMapBytes k;  // unset where kv_len is 0
  TensorMapBytes v;

  void* out;
  int64_t out_batch_stride;  // in elements
  int64_t out_row_stride;
  int64_t out_head_stride;
  float* lse;  // [batch][q_heads][q_len], natural log, or null

  int32_t q_heads;
  int32_t group_heads;  // query heads per kv head
  int32_t q_len;
  int32_t kv_len;
  int32_t value_depth;  // as given, not padded
  float scale_log2;     // |scale| * log2(e), above 0
  int32_t negate;       // 1: scale < 0

  int32_t pairs;       // batch * q_heads: (batch, head) pairs, heads innermost
  int32_t chunk;       // pairs that run together, so that their K and V stay in L2
  int32_t items;       // pairs * row tiles
  int32_t blocks;      // that share the items
  int32_t* next_item;  // 0 at launch; null: every block has one item at most

  plan::TileMap map;
  RunRecipe recipe;
  rules::Program program;
  ScoreParams scores;

  int32_t one_mask_row;  // 1: rows are heads, and the mask has one row for all of them

  // What parts of row tiles leave: two places a block; null: nothing is cut.
  float* parts;
  int32_t part_floats;  // of a place
  int32_t* arrived;     // [item][16 rows]: how many parts have; 0 at launch
};

}  // namespace anymask::cuda
