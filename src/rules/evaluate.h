// The postfix machine: runs a program for a tile's class or for one word of its bits.
#pragma once

#include "rules/leaves.h"

namespace anymask::rules {

// A stack of five named places. Pushing and popping move registers: an array indexed at run time
// would live in local memory on a GPU.
template <typename Value>
struct Stack {
  Value top{}, second{}, third{}, fourth{}, fifth{};

  ANYMASK_RULE void push(Value value) {
    fifth = fourth;
    fourth = third;
    third = second;
    second = top;
    top = value;
  }
  // Replaces the two upper places by `value`.
  ANYMASK_RULE void join(Value value) {
    top = value;
    second = third;
    third = fourth;
    fourth = fifth;
  }
};
static_assert(kMaxDepth == 5);

// Runs a program on values of any kind: `leaf` gives those of the leaves, `Joins` says what the
// operators do with them.
template <typename Joins, typename Leaf>
ANYMASK_RULE auto evaluate(const Program& program, const Leaf& leaf) {
  Stack<typename Joins::Value> stack;
  for (int i = 0; i < program.count; ++i) {
    const Node& node = program.nodes[i];
    switch (node.op) {
      case Op::kNot:
        stack.top = Joins::complement(stack.top);
        break;
      case Op::kAnd:
        stack.join(Joins::both(stack.top, stack.second));
        break;
      case Op::kOr:
        stack.join(Joins::either(stack.top, stack.second));
        break;
      default:
        stack.push(leaf(node));
        break;
    }
  }
  return stack.top;
}

struct JoinClasses {
  using Value = TileClass;
  ANYMASK_RULE static Value complement(Value a) { return class_not(a); }
  ANYMASK_RULE static Value both(Value a, Value b) { return class_and(a, b); }
  ANYMASK_RULE static Value either(Value a, Value b) { return class_or(a, b); }
};

struct JoinWords {
  using Value = uint32_t;
  ANYMASK_RULE static Value complement(Value a) { return ~a; }
  ANYMASK_RULE static Value both(Value a, Value b) { return a & b; }
  ANYMASK_RULE static Value either(Value a, Value b) { return a | b; }
};

// The caller's key at a position of the plan.
ANYMASK_RULE int key_at(const Program& program, Place place, int position) {
  if (program.key_order == nullptr) return position;
  const int64_t row = int64_t{place.batch} * (program.heads / program.order_divisor) +
                      place.head / program.order_divisor;
  return program.key_order[row * program.kv_len + position];
}

// The class of a tile of the caller's keys.
ANYMASK_RULE TileClass key_class(const Program& program, Place place, const Tile& tile) {
  return evaluate<JoinClasses>(program,
                               [&](const Node& node) { return leaf_class(node, place, tile); });
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
  return evaluate<JoinWords>(program, [&](const Node& node) {
    return leaf_word(node, place, key, first_row, program.q_len);
  });
}

}  // namespace anymask::rules
