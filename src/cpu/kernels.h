// What the drivers (compiled once) ask of the kernels (compiled once per instruction set).
//
// Plain data and function pointers only. A translation unit that is compiled for AVX-512 must not
// emit an inline function that another one also emits: the linker keeps one copy of the two, and an
// older CPU would then run AVX-512 code. So nothing in here has a body, and the kernels include
// neither the standard library's templates nor src/rules, but for templates (Philox) that they
// instantiate with types of their own namespace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anymask::cpu {

// Types of the caller's elements; the order of the tables below.
enum class Element : int { f32, f16, bf16, f64 };
inline constexpr int kElements = 4;

// Mask words cover 32 query rows. Word [group][key]: bit r is row 32 * group + r.
inline constexpr int kGroupRows = 32;
inline constexpr int kMaxTileRows = 256;
inline constexpr int kMaxTileKeys = 256;
// Rows that may be few, see Kernels::most_few_rows.
inline constexpr int kFewRows = 8;

// Rows of the caller's memory: `data` points at the first, strides are in elements.
struct RowsIn {
  const void* data;
  int64_t stride;
};
struct RowsOut {
  void* data;
  int64_t stride;
};

// The words of a tile: [row group][key], `stride` words between groups. nullptr: all allowed.
// Rows and keys that do not exist have their bits cleared.
struct Words {
  const uint32_t* data;
  int64_t stride;
};

// What happens to a job's scores beside scaling (anymask::ScoreOptions). Where anything does, the
// kernels work on logits in natural units; else on the products as they are.
struct ScoreChanges {
  bool any;
  double softcap;     // 0: none
  double keep_scale;  // of the weights that dropout keeps
  void* biases;  // room for a tile's biases: tile_rows * tile_keys sums; nullptr: there are none
};

// What is added to the scores of a tile, as the caller has it.
struct TileBiases {
  RowsIn pairs;        // a row per query, contiguous keys; nullptr: none
  bool wide;           // `pairs` has the sums' type, not the elements'
  const double* keys;  // one per key; nullptr: none
};

// One query tile of one head against a row of key tiles.
struct ForwardJob {
  RowsIn q;
  int rows;  // rows of this tile that exist, 1 .. tile_rows
  int tile_rows;
  int tile_keys;
  int head_dim;
  int v_head_dim;
  double scale;
  ScoreChanges changes;
  const double* sinks;  // the logit without a value of row r: sinks[r * sink_stride]; nullptr: none
  int64_t sink_stride;
  void* scratch;  // scratch_bytes long, 64-byte aligned
};

struct KeyTile {
  RowsIn k;
  RowsIn v;
  int keys;
  Words words;
  TileBiases biases;
  Words kept;  // pairs that dropout keeps
  // To be on its way into the cache meanwhile: the tile after this one (or nullptr).
  const void* next_k;
  const void* next_v;
};

struct ForwardKernel {
  size_t (*scratch_bytes)(int tile_rows, int tile_keys, int head_dim, int v_head_dim);
  void (*begin)(const ForwardJob& job);
  void (*tile)(const ForwardJob& job, const KeyTile& tile);
  // lse: one float (f64: double) per row, contiguous.
  void (*end)(const ForwardJob& job, RowsOut out, void* lse);
};

// One key tile of one key-value head against the row tiles of all query heads that share it.
struct BackwardJob {
  RowsIn k;
  RowsIn v;
  int keys;
  int tile_rows;
  int tile_keys;
  int head_dim;
  int v_head_dim;
  double scale;
  ScoreChanges changes;
  void* dlogits;  // gradient of a tile's logits, sums [row][tile_keys]; nullptr: not wanted
  void* scratch;
};

struct RowTile {
  RowsIn q;
  RowsIn dout;
  const void* lse;    // float (f64: double) per row, contiguous
  const void* delta;  // the same type: rowsum(dout * out) - dlse
  int rows;
  Words words;
  TileBiases biases;
  Words kept;
  // To be on their way into the cache meanwhile: the row tile after this one (or nullptr), and
  // where this tile's dq will be added.
  const void* next_q;
  const void* next_dout;
  RowsOut dq;
};

struct BackwardKernel {
  size_t (*scratch_bytes)(int tile_rows, int tile_keys, int head_dim, int v_head_dim);
  void (*begin)(const BackwardJob& job);
  // Adds the row tile's share to dk and dv, and leaves its dq in scratch and its dlogits there.
  void (*tile)(const BackwardJob& job, const RowTile& tile);
  // Adds that dq to `sum` (f64: double, else float); `first`: overwrites it.
  void (*add_dq)(const BackwardJob& job, int rows, bool first, RowsOut sum);
  // Writes dk and dv.
  void (*end)(const BackwardJob& job, RowsOut dk, RowsOut dv);
  // Rounds `rows` rows of float to the caller's type (f32, f64: copies).
  void (*round)(RowsIn sum, int rows, int head_dim, RowsOut dq);
  // delta[row] = rowsum(dout * out) - dlse; dlse may be nullptr.
  void (*delta)(RowsIn dout, RowsIn out, const void* dlse, int rows, int v_head_dim, void* delta);
};

struct Kernels {
  const char* name;
  // Dropout: words[key] = the rows of the 32 from first_row on that keep a key, for the 64 keys of
  // a block of the pattern.
  void (*kept_words)(uint32_t key0, uint32_t key1, uint32_t digits, uint32_t first_row,
                     uint32_t block, uint32_t* words);
  ForwardKernel forward[kElements];
  // For jobs without score options of up to so many rows. Those of more fill the lanes.
  ForwardKernel few_rows[kElements];
  int most_few_rows[kElements];
  BackwardKernel backward[kElements];
  // Multiply-adds on registers only: returns the floating-point operations done.
  double (*spin[kElements])(int64_t rounds);
  // words[key] = the rows [begin[key], end[key]) of the 32 from first_row on; `add`: beside those
  // that are there.
  void (*run_words)(const int32_t* begin, const int32_t* end, int keys, int first_row, bool add,
                    uint32_t* words);
};

// nullptr where this build has no such kernels.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

// The kernels in use.
const Kernels& kernels();

}  // namespace anymask::cpu
