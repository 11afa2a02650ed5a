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
};

// The plan of a lowered mask in `buffer`. Only pointers are computed: the buffer may hold anything.
Plan view(const rules::Program& lowered, const TileShapes& shapes, void* buffer);

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

}  // namespace anymask::plan
