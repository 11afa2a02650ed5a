// A tile's mask bits, evaluated for the kernels.
#pragma once

#include "cpu/kernels.h"
#include "rules/program.h"

namespace anymask::cpu {

inline constexpr int kWordsStride = kMaxTileKeys;
inline constexpr int kTileWords = kMaxTileRows / kGroupRows * kWordsStride;

// Fills words[group][key] for the tile, zeros up to the next multiple of 32 keys and in the bits of
// rows that do not exist. tile.row_begin is a multiple of 32.
void tile_words(const rules::Program& program, rules::Place place, const rules::Tile& tile,
                uint32_t* words);

}  // namespace anymask::cpu
