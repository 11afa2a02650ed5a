// A lowered mask: nodes in postfix order, as plain data that a kernel takes by value.
#pragma once

#include "rules/common.h"

namespace anymask::rules {

enum class Op : int32_t {
  kConstant,   // flag != 0
  kBand,       // lo <= column - row <= hi
  kPrefix,     // column < n: `lo`, or columns[batch] when there is an array
  kIntervals,  // masked runs of rows per column; `flag` is an IntervalForm
  kSegments,   // row and column between the same two of `lo` rising boundaries
  kIds,        // eq[row] == ek[column]; `flag` != 0: or eq[row] >= 0
  kBlocks,     // block[row / lo][column / hi] != 0
  kDense,      // element[row][column] != 0; `flag` is 1 for floating point (-0.0 is zero), else 0
  kBits,       // packed words [row / 32][column], bit row % 32; strides may be 0
  kNot,
  kAnd,
  kOr,
};

// How the columns of startend_row_indices say which rows a key column masks.
enum class IntervalForm : int32_t {
  kFrom,     // [LTS, end)                         one column
  kRun,      // [LTS, LTE)                         two columns under a causal triangle
  kOutside,  // [LTS, end) and [0, UTE)            two columns
  kTwoRuns,  // [LTS, LTE) and [UTS, UTE)          four columns
};

// One array that a leaf reads, strides in elements: value(batch, head, row, column). Batch and
// head strides are 0 where the array is broadcast.
struct Array {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  int32_t bytes = 0;         // size of an element
  int32_t head_divisor = 1;  // mask head of the program -> head of this array
};

struct Node {
  Op op = Op::kConstant;
  int32_t flag = 0;
  int32_t lo = 0;
  int32_t hi = 0;
  Array rows = {};     // kIds: eq
  Array columns = {};  // everything else that reads memory
};

// 16 leaves at most; ordered so that the deeper operand comes first, they need five stack places.
inline constexpr int kMaxNodes = 32;
inline constexpr int kMaxDepth = 5;

struct Program {
  int32_t count = 0;
  int32_t batches = 1;  // 1 (the same mask for every batch entry) or B
  int32_t heads = 1;    // mask heads: a divisor of the query heads
  int32_t q_len = 0;
  int32_t kv_len = 0;
  int32_t reorder_keys = 0;   // the plan shall bring keys of similar columns together
  int32_t order_divisor = 1;  // mask head -> head of key_order
  // [batches][heads / order_divisor][kv_len]: position in the plan -> key of the caller; nullptr:
  // keys stay as they come.
  const int32_t* key_order = nullptr;
  Node nodes[kMaxNodes] = {};
};

// Where a question is asked: one mask batch entry and mask head.
struct Place {
  int batch;
  int head;
};

// A tile of rows [row_begin, row_end) x columns (positions, where keys are reordered)
// [column_begin, column_end), not empty, inside [0, q_len) x [0, kv_len).
struct Tile {
  int row_begin;
  int row_end;
  int column_begin;
  int column_end;
};

}  // namespace anymask::rules
