#include "cpu/words.h"

#include "rules/evaluate.h"

namespace anymask::cpu {
namespace {

using rules::Node;
using rules::Op;
using rules::Place;
using rules::Program;

// The caller's keys of a tile, and how many words of each: `groups` from first_row on.
struct Keys {
  const int* at;
  int count;
  int first_row, groups;
};

uint32_t* words_of(uint32_t* words, int group) { return words + group * kWordsStride; }

// words[group][key] = rule(key, first row of the group)
template <class Rule>
void each_word(Keys keys, uint32_t* words, const Rule& rule) {
  for (int group = 0; group < keys.groups; ++group) {
    const int row = keys.first_row + group * kGroupRows;
    uint32_t* to = words_of(words, group);
    for (int i = 0; i < keys.count; ++i) to[i] = rule(keys.at[i], row);
  }
}

// The rows of one run per key; `add`: beside those that are there.
template <class Run>
void runs_words(Keys keys, bool add, uint32_t* words, const Run& run) {
  int32_t begin[kMaxTileKeys], end[kMaxTileKeys];
  for (int i = 0; i < keys.count; ++i) {
    const auto [from, to] = run(keys.at[i]);
    begin[i] = from;
    end[i] = to;
  }
  for (int group = 0; group < keys.groups; ++group) {
    kernels().run_words(begin, end, keys.count, keys.first_row + group * kGroupRows, add,
                        words_of(words, group));
  }
}

struct Run {
  int begin, end;
};

void interval_words(const Node& node, Place place, Keys keys, uint32_t* words) {
  runs_words(keys, false, words, [&](int key) -> Run {
    const rules::MaskedRuns runs = rules::masked_runs(node, place, key);
    return {runs.begin1, runs.end1};
  });
  const auto form = static_cast<rules::IntervalForm>(node.flag);
  if (form == rules::IntervalForm::kOutside || form == rules::IntervalForm::kTwoRuns) {
    runs_words(keys, true, words, [&](int key) -> Run {
      const rules::MaskedRuns runs = rules::masked_runs(node, place, key);
      return {runs.begin2, runs.end2};
    });
  }
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
  for (int i = 0; i < keys.count; ++i) {
    const int64_t wanted =
        rules::load_integer(node.columns, place, keys.at[i] * node.columns.row_stride);
    uint32_t word = open;
    for (int j = 0; j < different; ++j) word |= ids[j] == wanted ? rows_of[j] : 0u;
    words[i] = word;
  }
}

template <class Change>
void change_words(Keys keys, const Change& change) {
  for (int group = 0; group < keys.groups; ++group) {
    for (int i = 0; i < keys.count; ++i) change(group * kWordsStride + i);
  }
}

void leaf_words(const Program& program, const Node& node, Place place, Keys keys, uint32_t* words) {
  switch (node.op) {
    case Op::kBand:
      return runs_words(keys, false, words, [&](int key) -> Run {
        return {key - node.hi, key - node.lo + 1};
      });
    case Op::kSegments:
      return runs_words(keys, false, words, [&](int key) -> Run {
        const rules::Segment segment = rules::segment_of(node, place, key);
        return {segment.begin, segment.end};
      });
    case Op::kIntervals:
      interval_words(node, place, keys, words);
      return change_words(keys, [=](int i) { words[i] = ~words[i]; });
    case Op::kBits:
      return each_word(keys, words,
                       [&](int key, int row) { return rules::bits_word(node, place, key, row); });
    case Op::kIds:
      for (int group = 0; group < keys.groups; ++group) {
        ids_words(node, place, keys, keys.first_row + group * kGroupRows, program.q_len,
                  words_of(words, group));
      }
      return;
    default:
      return each_word(keys, words, [&](int key, int row) {
        return rules::leaf_word(node, place, key, row, program.q_len);
      });
  }
}

}  // namespace

// The postfix machine of rules/evaluate.h over all words of a tile at once: a node's kind is looked
// at once a tile, and joining is plain vector code.
void tile_words(const rules::Program& program, rules::Place place, const rules::Tile& tile,
                uint32_t* words) {
  int at[kWordsStride];
  const int rows = tile.row_end - tile.row_begin;
  const Keys keys{at, tile.column_end - tile.column_begin, tile.row_begin,
                  (rows + kGroupRows - 1) / kGroupRows};
  for (int i = 0; i < keys.count; ++i) {
    at[i] = rules::key_at(program, place, tile.column_begin + i);
  }
  uint32_t upper[rules::kMaxDepth - 1][kTileWords];  // the stack above its lowest place, `words`
  int depth = 0;
  const auto level = [&](int n) { return n == 0 ? words : upper[n - 1]; };
  for (int n = 0; n < program.count; ++n) {
    const Node& node = program.nodes[n];
    uint32_t* top = depth > 0 ? level(depth - 1) : nullptr;
    uint32_t* second = depth > 1 ? level(depth - 2) : nullptr;
    switch (node.op) {
      case Op::kNot:
        change_words(keys, [=](int i) { top[i] = ~top[i]; });
        break;
      case Op::kAnd:
        change_words(keys, [=](int i) { second[i] &= top[i]; });
        --depth;
        break;
      case Op::kOr:
        change_words(keys, [=](int i) { second[i] |= top[i]; });
        --depth;
        break;
      default:
        leaf_words(program, node, place, keys, level(depth++));
        break;
    }
  }
  const int padded_keys = (keys.count + 31) / 32 * 32;
  for (int group = 0; group < keys.groups; ++group) {
    uint32_t* to = words_of(words, group);
    const uint32_t exist = rules::low_bits(rows - group * kGroupRows);
    for (int i = 0; i < keys.count; ++i) to[i] &= exist;
    for (int i = keys.count; i < padded_keys; ++i) to[i] = 0;
  }
}

}  // namespace anymask::cpu
