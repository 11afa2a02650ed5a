// Dropout's pattern for a tile, in the same words as a mask's bits.
#pragma once

#include "cpu/keys.h"
#include "rules/philox.h"

namespace anymask::cpu {

// Fills words[group][key] with the pairs that are kept; bits of rows that do not exist are
// arbitrary. `row` is a multiple of 32.
void kept_words(const rules::Dropout& dropout, const TileKeys& keys, int64_t row, int rows,
                uint32_t* words);

}  // namespace anymask::cpu
