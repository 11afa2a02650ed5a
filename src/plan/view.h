// A plan as its users see it, and how it is laid out in its flat buffer.
#pragma once

#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::plan {

struct Plan {
  rules::Program program;  // dense leaves replaced by their packed words; key order set
  TileMap forward_rows;    // in the forward tile shape
  TileMap backward_rows;   // in the backward tile shape; the same memory if the shapes agree
  TileMap backward_columns;
  // [batches][heads / order_divisor], with a key order: how many of its keys some row sees.
  int32_t* seen_keys;
};

// The plan of a lowered mask in `buffer`. Only pointers are computed: the buffer may hold anything.
Plan view(const rules::Program& lowered, const TileShapes& shapes, void* buffer);

// The same plan with maps for the forward pass alone: builders leave the others as they are.
Plan forward_only(Plan plan);

// The size of that buffer: a function of shapes alone.
int64_t bytes_needed(const rules::Program& lowered, const TileShapes& shapes);

// Packed words of a dense leaf: one word covers 32 rows; a broadcast row or column is stored once.
struct PackedShape {
  int64_t batches, heads, row_words, columns;
};
PackedShape packed_shape(const rules::Program& program, const rules::Node& dense_leaf);

inline int64_t places(const rules::Program& program) {
  return int64_t{program.batches} * program.heads;
}

// Places that have an order of keys of their own.
inline int64_t orders(const rules::Program& program) {
  return int64_t{program.batches} * (program.heads / program.order_divisor);
}

}  // namespace anymask::plan
