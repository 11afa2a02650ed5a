#include "cpu/words.h"

#include "rules/evaluate.h"

namespace anymask::cpu {
namespace {

using rules::Node;
using rules::Op;
using rules::Place;
using rules::Program;

// The caller's keys of a tile.
struct Keys {
  const int* at;
  int count;
};

template <class Rule>
void each_key(Keys keys, uint32_t* words, const Rule& rule) {
  for (int i = 0; i < keys.count; ++i) words[i] = rule(keys.at[i]);
}

// The rows of a group hold few different ids: the word of each, then one comparison per id and key
// instead of 32.
void ids_words(const Node& node, Place place, Keys keys, int first_row, int q_len,
               uint32_t* words) {
  int64_t ids[kGroupRows];
  uint32_t rows_of[kGroupRows];
  int different = 0;
  uint32_t open = 0;
  const int rows = rules::min_of(kGroupRows, q_len - first_row);
  for (int r = 0; r < rows; ++r) {
    const int64_t id =
        rules::load_integer(node.rows, place, (first_row + r) * node.rows.row_stride);
    if (node.flag != 0 && id >= 0) {
      open |= 1u << r;
      continue;
    }
    int known = 0;
    while (known < different && ids[known] != id) ++known;
    if (known == different) {
      ids[different] = id;
      rows_of[different++] = 0;
    }
    rows_of[known] |= 1u << r;
  }
  each_key(keys, words, [&](int key) {
    const int64_t wanted = rules::load_integer(node.columns, place, key * node.columns.row_stride);
    uint32_t word = open;
    for (int i = 0; i < different; ++i) word |= ids[i] == wanted ? rows_of[i] : 0u;
    return word;
  });
}

void leaf_words(const Program& program, const Node& node, Place place, Keys keys, int row,
                uint32_t* words) {
  switch (node.op) {
    case Op::kBand:
      return each_key(keys, words, [&](int key) { return rules::band_word(node, key, row); });
    case Op::kIntervals:
      return each_key(keys, words,
                      [&](int key) { return rules::intervals_word(node, place, key, row); });
    case Op::kBits:
      return each_key(keys, words,
                      [&](int key) { return rules::bits_word(node, place, key, row); });
    case Op::kIds:
      return ids_words(node, place, keys, row, program.q_len, words);
    default:
      return each_key(keys, words, [&](int key) {
        return rules::leaf_word(node, place, key, row, program.q_len);
      });
  }
}

// The postfix machine of rules/evaluate.h over all keys of a tile at once: a node's kind is looked
// at once a tile, and joining is plain vector code.
void group_words(const Program& program, Place place, Keys keys, int row, uint32_t* words) {
  uint32_t upper[rules::kMaxDepth - 1][kWordsStride];  // the stack above its lowest place, `words`
  int depth = 0;
  const auto at = [&](int level) { return level == 0 ? words : upper[level - 1]; };
  for (int n = 0; n < program.count; ++n) {
    const Node& node = program.nodes[n];
    uint32_t* top = depth > 0 ? at(depth - 1) : nullptr;
    uint32_t* second = depth > 1 ? at(depth - 2) : nullptr;
    switch (node.op) {
      case Op::kNot:
        for (int i = 0; i < keys.count; ++i) top[i] = ~top[i];
        break;
      case Op::kAnd:
        for (int i = 0; i < keys.count; ++i) second[i] &= top[i];
        --depth;
        break;
      case Op::kOr:
        for (int i = 0; i < keys.count; ++i) second[i] |= top[i];
        --depth;
        break;
      default:
        leaf_words(program, node, place, keys, row, at(depth++));
        break;
    }
  }
}

}  // namespace

void tile_words(const rules::Program& program, rules::Place place, const rules::Tile& tile,
                uint32_t* words) {
  int at[kWordsStride];
  const Keys keys{at, tile.column_end - tile.column_begin};
  for (int i = 0; i < keys.count; ++i) {
    at[i] = rules::key_at(program, place, tile.column_begin + i);
  }
  const int padded_keys = (keys.count + 31) / 32 * 32;
  for (int row = tile.row_begin; row < tile.row_end; row += kGroupRows) {
    group_words(program, place, keys, row, words);
    const uint32_t exist = rules::low_bits(tile.row_end - row);
    for (int i = 0; i < keys.count; ++i) words[i] &= exist;
    for (int i = keys.count; i < padded_keys; ++i) words[i] = 0;
    words += kWordsStride;
  }
}

}  // namespace anymask::cpu
