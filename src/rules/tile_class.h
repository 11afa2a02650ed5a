// Three-valued classes of a tile of query rows x key columns, as two bits.
#pragma once

#include "rules/common.h"

namespace anymask::rules {

// kVisible: some pair of the tile is allowed. kHidden: some pair is not.
using TileClass = uint32_t;
inline constexpr TileClass kVisible = 1;
inline constexpr TileClass kHidden = 2;
inline constexpr TileClass kNone = kHidden;             // no pair is allowed: skip the tile
inline constexpr TileClass kAll = kVisible;             // every pair is allowed: no mask needed
inline constexpr TileClass kSome = kVisible | kHidden;  // look at the bits

ANYMASK_RULE constexpr TileClass class_not(TileClass a) { return (a >> 1) | ((a & 1) << 1); }

// `some & some` stays `some`: whether the allowed pairs meet only the bits can tell.
ANYMASK_RULE constexpr TileClass class_and(TileClass a, TileClass b) {
  return (a & b & kVisible) | ((a | b) & kHidden);
}

ANYMASK_RULE constexpr TileClass class_or(TileClass a, TileClass b) {
  return ((a | b) & kVisible) | (a & b & kHidden);
}

// The class of two tiles together.
ANYMASK_RULE constexpr TileClass class_union(TileClass a, TileClass b) { return a | b; }

ANYMASK_RULE constexpr TileClass class_of(bool any_visible, bool any_hidden) {
  return (any_visible ? kVisible : 0u) | (any_hidden ? kHidden : 0u);
}

// The class of the pairs that `word` holds under `rows`, the word of rows that exist.
ANYMASK_RULE constexpr TileClass class_of_word(uint32_t word, uint32_t rows) {
  return class_of((word & rows) != 0, (~word & rows) != 0);
}

}  // namespace anymask::rules
