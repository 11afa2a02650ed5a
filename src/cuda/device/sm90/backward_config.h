// The Hopper backward kernels' variants and their one parameter. Host and device.
#pragma once

#include "cuda/device/score_params.h"
#include "cuda/device/sm90/forward_config.h"  // TensorMapBytes, RunRecipe
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// Query rows of a tile: two words of mask bits a key, one 128-byte swizzled row of dS^T.
inline constexpr int kBackwardRows = 64;
inline constexpr int kGradRows = 16;           // of dQ, dK or dV, that a math warp stores at once
inline constexpr int kBackwardWarpgroups = 2;  // that own keys, or (wide) parts of the depth

// How the parts of a row tile of dQ meet. kUnchained: added in any order to sums that one kernel
// clears and another converts. kOrdered: in the order of falling key tiles; the first stores, the
// last converts. kLoose: so do these, but between them the order is any.
inline constexpr int32_t kUnchained = 0, kOrdered = 1, kLoose = 2;

// One variant. Integers only: the launcher hands them to the compiler as a list.
struct BackwardConfig {
  int32_t half;         // 1: fp16, 0: bf16
  int32_t depth;        // head dimension of q and k, padded: 64, 128, 256
  int32_t value_depth;  // head dimension of v and out, padded likewise; wide: equal to depth
  int32_t wide;         // 0: a warpgroup owns 64 of 128 keys, a third one makes dQ
                        // 1: a warpgroup owns half of the depth of 64 keys, and of dQ
  int32_t k_stages;     // tiles of K: 2 where the next item's may come early
  int32_t q_stages;     // tiles of Q in shared memory
  int32_t o_stages;     // tiles of dO
  int32_t slope_slots;  // tiles of dS: what the warpgroup of dQ may be behind
  int32_t chained;      // how the parts of a row tile of dQ meet: kUnchained and so on
  int32_t bit_slots;    // partial tiles whose bits, or keys whose runs, are in shared memory
  int32_t mask_path;    // a MaskPath
  int32_t math_registers;
  int32_t query_registers;  // of the warpgroup that makes dQ
  int32_t load_registers;
  int32_t adds_keys;  // 1: query heads and segments of their rows are items of their own, and what
                      // they make of dK and dV is added up (backward_key_sums.h)
  int32_t features;   // score options: kSoftcap and so on

  constexpr bool has(int32_t feature) const { return (features & feature) != 0; }
  // Whether math threads read rows' numbers in float32. A softcap comes between S and lse, and what
  // dropout takes away between dP and the rows' sums, so products cannot add those any more.
  constexpr bool reads_rows() const { return has(kSoftcap | kDropout); }
  // What a step puts aside until dP is there: a softcap's derivative, P with nothing dropped. With
  // 64 columns of dK and dV a thread has registers for it; up to 128 the place where dK and dV
  // leave serves for one of them.
  constexpr bool puts_aside_in_registers() const {
    return has(kSoftcap) != has(kDropout) && wide == 0 && depth + value_depth <= 128;
  }
  // Math threads that make dS.
  constexpr int slope_threads() const { return wide != 0 ? 128 : 128 * kBackwardWarpgroups; }
  constexpr int aside_places() const {
    const int pieces = (has(kSoftcap) ? 1 : 0) + (has(kDropout) ? 1 : 0);
    if (puts_aside_in_registers()) return 0;
    return wide != 0 || pieces == 0 ? pieces : pieces - 1;
  }
  // Whether parts of dQ meet in chains, whose turns a thread of its own sees to.
  constexpr bool has_turns() const { return chained != kUnchained; }
  // Whether a warpgroup of its own makes dQ.
  constexpr bool has_query() const { return wide == 0; }
  constexpr MaskPath masks() const { return static_cast<MaskPath>(mask_path); }
  constexpr bool baked() const { return masks() == MaskPath::kBaked; }
  // Whether the warps that make bits have something to do.
  constexpr bool makes_bits() const { return !baked() || has(kDropout); }
  constexpr int rows() const { return kBackwardRows; }
  constexpr int columns() const { return wide != 0 ? 64 : 128; }
  constexpr plan::TileShape tile() const { return {rows(), columns()}; }
  // Producers, warpgroups that own keys, and the one that makes dQ.
  constexpr int warpgroups() const { return 1 + kBackwardWarpgroups + (has_query() ? 1 : 0); }
  constexpr int threads() const { return 128 * warpgroups(); }
  constexpr int registers() const {
    return load_registers + kBackwardWarpgroups * math_registers +
           (has_query() ? query_registers : 0);
  }
  // dQ of a row tile is made in so many parts of the depth: by as many warpgroups (wide), or one
  // after the other, 32 accumulators a thread each.
  constexpr int parts() const { return wide != 0 ? kBackwardWarpgroups : depth / 64; }
  constexpr int part_depth() const { return depth / parts(); }
  // K, V, the rings of Q, dO and dS (wide: and P), what leaves of dK and dV, the rings of
  // statistics and mask bits, the keys' runs, and 3 KiB for barriers, alignment and the like.
  constexpr int shared_bytes() const {
    const int keys = columns();
    return (keys * k_stages + kBackwardRows * q_stages) * depth * 2 +
           (keys + kBackwardRows * o_stages) * value_depth * 2 +
           (slope_slots + wide) * keys * kBackwardRows * 2 + q_stages * kBackwardRows * 16 +
           (wide != 0 ? 0 : keys * 128) +
           keys * (masks() == MaskPath::kRuns ? 8 + bit_slots * 24 : bit_slots * 8 + 24) +
           option_bytes() + 3072;
  }
  // What score options add: rows' numbers, kept pairs, keys' biases and sums, what is put aside.
  constexpr int option_bytes() const {
    const int keys = columns();
    return (reads_rows() ? q_stages * kBackwardRows * 8 : 0) +
           (has(kDropout) ? bit_slots * keys * 8 : 0) +
           (has(kKeyBias) ? keys * 12 + slope_threads() * 8 : 0) +
           (has(kBiasTiles) ? q_stages * keys * kBackwardRows * 2 : 0) +
           aside_places() * keys * kBackwardRows * 2;
  }
};

// A bias's tiles (backward_bias_tiles.h): a math warp's piece of keys, and the sums of a tile.
inline constexpr int kBiasPieceKeys = 16;
inline constexpr int kBiasTileSums = kBackwardRows * 128;

// Whether a recipe's ids have code of their own. Beside dropout's pattern and the waiting for turns
// there are no registers for it.
constexpr bool ids_by_recipe(bool has_turns, int32_t features) {
  return !(has_turns && (features & kDropout) != 0);
}

// The gradient of a bias of pairs: of q's type, or float32, which is added to. The last dimension
// is contiguous; strides in elements, 0 where one entry serves all. With kBiasTiles float32 is in
// tiles of kBiasTileSums, rows of key tiles.
struct BiasGradient {
  void* data;  // null: not wanted
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int32_t wide;  // 1: float32
};

// Whether dQ is made apart from dK and dV (backward_split.h). Whoever launches the kernels does not
// know the mask, so both are launched, and one returns at once.
struct SplitChoice {
  const int64_t* visible_tiles;  // of the plan's column map; null: never
  int64_t most;                  // apart, unless there are more of them
};

// Everything that the three kernels of a backward pass read. Strides are in elements, and the last
// dimension is contiguous.
struct BackwardParams {
  TensorMapBytes q;  // dimensions: depth, length, heads, batch
  TensorMapBytes k;
  TensorMapBytes v;
  TensorMapBytes out_grad;
  TensorMapBytes k_grad_map;  // boxes of 16 rows; not wide, and keys in the caller's order
  TensorMapBytes v_grad_map;

  const void* out;
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  const void* grad;  // of out, as the map out_grad has it
  int64_t grad_batch_stride, grad_row_stride, grad_head_stride;
  const float* lse;       // [batch][q_heads][q_len], natural log
  const float* lse_grad;  // likewise, or null

  void* q_grad;
  int64_t q_grad_batch_stride, q_grad_row_stride, q_grad_head_stride;
  void* k_grad;
  int64_t k_grad_batch_stride, k_grad_row_stride, k_grad_head_stride;
  void* v_grad;
  int64_t v_grad_batch_stride, v_grad_row_stride, v_grad_head_stride;

  // Workspace, linear in q_len. A row tile is (batch * q_heads + head) * row_tiles + tile.
  float *k_sums,
      *v_sums;      // [pair][key tile][2][64 * depth]: dK / scale and dV, where they are added
  float* q_sums;    // [row tile][64 * depth]: dQ / scale, in the order of the accumulators
  uint16_t* stats;  // [row tile][64][kRowStats]
  int32_t* turns;   // [row tile], chained: how many key tiles have added
  int32_t* next_item;
  int32_t* known;  // [kPairTiles + batch * kv_heads], dQ apart: row tiles with statistics

  int32_t batch;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t group_heads;  // query heads per kv head
  int32_t q_len;
  int32_t kv_len;
  int32_t depth;  // as given, not padded
  int32_t value_depth;
  float scale;
  float scale_log2;      // of S, with log2(e); never 0
  int32_t lse_exponent;  // parts of lse come in units of 2^this

  int32_t row_tiles;
  // (batch, head) pairs, heads innermost: kv heads, or query heads where these are items of their
  // own, and then each as often as there are segments
  int32_t pairs;
  int32_t segments;       // of the rows, 1 unless query heads are items of their own
  int32_t segment_tiles;  // row tiles of each
  int32_t chunk;          // pairs that run together, so that their Q, dO and dQ stay in L2
  int32_t tail;           // pairs at the end that run together, so that blocks end together
  int32_t near_tiles;     // in order (chunk_of): row tiles whose Q, dO and dQ fill a third of L2,
  int32_t most_pairs;     // and pairs that have a little more than fills it
  int32_t items;          // pairs * key tiles
  int32_t blocks;         // that share the items

  SplitChoice choice;
  plan::TileMap columns;  // outer: key tiles
  plan::TileMap rows;     // outer: row tiles; chained only
  RunRecipe recipe;
  rules::Program program;

  // Score options. A bias that has one row for all queries is one of keys.
  ScoreParams scores;
  Numbers column_bias;  // by batch, head, key: added to scores.key_bias
  BiasGradient bias_grad;
  TensorMapBytes bias_map, bias_grad_map;  // with kBiasTiles: boxes of kBiasPieceKeys x 64 rows
  float* row_numbers;  // [row tile][2][64]: kLseOfRow, kSumOfRow; null: nobody asks for them
  float* key_sums;     // [batch][q_heads][kv_len], of the logits' gradients; null: not wanted
  // With a bias of pairs, the launch's pairs are first_pair + i * pair_step.
  int32_t first_pair;
  int32_t pair_step;

  // Whether dQ is made apart from dK and dV.
  bool splits() const {
    return choice.visible_tiles != nullptr && *choice.visible_tiles <= choice.most;
  }
};

// BackwardParams::known: how many row tiles have their statistics begun, of those that first items
// need and of the others; from kPairTiles on, by kv head, how many have them.
inline constexpr int kEarlyTiles = 0;
inline constexpr int kLateTiles = 1;
inline constexpr int kPairTiles = 2;

// What is known of a query row in float32: lse times log2(e), +infinity for rows that see nothing
// or do not exist; rowsum(dO O) - dlse.
inline constexpr int kLseOfRow = 0;
inline constexpr int kSumOfRow = 1;

// What is known of a query row before the pass, as eight 16-bit numbers: -lse / scale in three
// parts and -rowsum(dO O) in four. A product with constants adds them to S and dP, which costs the
// tensor cores 5% and saves every math thread 32 numbers a step from shared memory, whose bandwidth
// is what bounds the kernel. A part is what the parts before it have left, in units of a power of
// two.
inline constexpr int kRowStats = 8;
inline constexpr int kLseParts = 3;
inline constexpr int kSumParts = 4;
// Units of the sums' parts: together fp16's range reaches from 2^-38 to 2^30.
constexpr int sum_exponent(int part) {
  constexpr int kExponents[kSumParts] = {14, 4, -6, -14};
  return kExponents[part];
}

// What makes these numbers has blocks of 8 rows of O and dO in shared memory, so many bytes each.
constexpr int row_stats_bytes(int value_depth) { return 2 * 8 * value_depth * 2; }
// The kernel that makes them before the pass: four warps with so many blocks each.
inline constexpr int kPrepareThreads = 128;
constexpr int prepare_stages(int value_depth) { return value_depth > 128 ? 2 : 4; }
constexpr int prepare_shared_bytes(int value_depth) {
  return kPrepareThreads / 32 * prepare_stages(value_depth) * row_stats_bytes(value_depth);
}

}  // namespace anymask::cuda
