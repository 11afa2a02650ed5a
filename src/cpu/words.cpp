#include "cpu/words.h"

#include "rules/evaluate.h"

namespace anymask::cpu {

void tile_words(const rules::Program& program, rules::Place place, const rules::Tile& tile,
                uint32_t* words) {
  const int keys = tile.column_end - tile.column_begin;
  const int padded_keys = (keys + 31) / 32 * 32;
  for (int row = tile.row_begin; row < tile.row_end; row += kGroupRows) {
    const uint32_t exist = rules::low_bits(tile.row_end - row);
    for (int key = 0; key < keys; ++key) {
      words[key] =
          rules::column_word(program, place, tile.column_begin + key, row) & exist;
    }
    for (int key = keys; key < padded_keys; ++key) words[key] = 0;
    words += kWordsStride;
  }
}

}  // namespace anymask::cpu
