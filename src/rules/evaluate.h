// The postfix machine: runs a program for a tile's class or for one word of its bits.
#pragma once

#include "rules/leaves.h"

namespace anymask::rules {

// A stack of five named places. Pushing and popping move registers: an array indexed at run time
// would live in local memory on a GPU.
struct Stack {
  uint32_t top = 0, second = 0, third = 0, fourth = 0, fifth = 0;

  ANYMASK_RULE void push(uint32_t value) {
    fifth = fourth;
    fourth = third;
    third = second;
    second = top;
    top = value;
  }
  // Replaces the two upper places by `value`.
  ANYMASK_RULE void join(uint32_t value) {
    top = value;
    second = third;
    third = fourth;
    fourth = fifth;
  }
};
static_assert(kMaxDepth == 5);

// The caller's key at a position of the plan.
ANYMASK_RULE int key_at(const Program& program, Place place, int position) {
  if (program.key_order == nullptr) return position;
  const int64_t row = int64_t{place.batch} * (program.heads / program.order_divisor) +
                      place.head / program.order_divisor;
  return program.key_order[row * program.kv_len + position];
}

// The class of a tile of the caller's keys.
ANYMASK_RULE TileClass key_class(const Program& program, Place place, const Tile& tile) {
  Stack stack;
  for (int i = 0; i < program.count; ++i) {
    const Node& node = program.nodes[i];
    switch (node.op) {
      case Op::kNot:
        stack.top = class_not(stack.top);
        break;
      case Op::kAnd:
        stack.join(class_and(stack.top, stack.second));
        break;
      case Op::kOr:
        stack.join(class_or(stack.top, stack.second));
        break;
      default:
        stack.push(leaf_class(node, place, tile));
        break;
    }
  }
  return stack.top;
}

// The class of a tile of the plan. Reordered keys are no range: each is asked about on its own.
ANYMASK_RULE TileClass tile_class(const Program& program, Place place, const Tile& tile) {
  if (program.key_order == nullptr) return key_class(program, place, tile);
  TileClass result = 0;
  for (int position = tile.column_begin; position < tile.column_end && result != kSome;
       ++position) {
    const int key = key_at(program, place, position);
    result |= key_class(program, place, {tile.row_begin, tile.row_end, key, key + 1});
  }
  return result;
}

// Which of the rows [first_row, first_row + 32) may see the key at `position`. first_row: a
// multiple of 32 below q_len; 0 <= position < kv_len. Bits of rows from q_len on are arbitrary.
ANYMASK_RULE uint32_t column_word(const Program& program, Place place, int position,
                                  int first_row) {
  const int key = key_at(program, place, position);
  Stack stack;
  for (int i = 0; i < program.count; ++i) {
    const Node& node = program.nodes[i];
    switch (node.op) {
      case Op::kNot:
        stack.top = ~stack.top;
        break;
      case Op::kAnd:
        stack.join(stack.top & stack.second);
        break;
      case Op::kOr:
        stack.join(stack.top | stack.second);
        break;
      default:
        stack.push(leaf_word(node, place, key, first_row, program.q_len));
        break;
    }
  }
  return stack.top;
}

}  // namespace anymask::rules
