#include "cpu/key_order.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/threads.h"
#include "rules/evaluate.h"

namespace anymask::cpu {
namespace {

using rules::Place;
using rules::Program;

// The rows that bound what a key is seen by: [first, last).
struct SeenKey {
  int32_t key, first, last;
};

bool any_visible(const Program& program, Place place, int key, int row_begin, int row_end) {
  return (rules::key_class(program, place, {row_begin, row_end, key, key + 1}) & rules::kVisible) !=
         0;
}

// Halves the rows with the class of the column over each half: about 2 log2(rows) looks.
SeenKey seen_rows(const Program& program, Place place, int key) {
  SeenKey seen{key, 0, 0};
  if (!any_visible(program, place, key, 0, program.q_len)) return seen;
  int low = 0, high = program.q_len;  // the first visible row lies in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_visible(program, place, key, low, middle) ? high : low) = middle;
  }
  seen.first = low;
  high = program.q_len;  // and so does the last
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (any_visible(program, place, key, middle, high) ? low : high) = middle;
  }
  seen.last = low + 1;
  return seen;
}

// What the heads that share an order see of a key, together.
SeenKey seen_by_heads(const Program& program, int batch, int first_head, int key) {
  SeenKey all{key, program.q_len, 0};
  for (int head = first_head; head < first_head + program.order_divisor; ++head) {
    const SeenKey seen = seen_rows(program, {batch, head}, key);
    if (seen.last == 0) continue;
    all.first = std::min(all.first, seen.first);
    all.last = std::max(all.last, seen.last);
  }
  return all;
}

void order_place(const Program& program, int batch, int first_head, int tile_columns,
                 int32_t* order) {
  std::vector<SeenKey> seen;
  std::vector<int32_t> dropped;
  for (int key = 0; key < program.kv_len; ++key) {
    const SeenKey found = seen_by_heads(program, batch, first_head, key);
    if (found.last == 0) {
      dropped.push_back(key);
    } else {
      seen.push_back(found);
    }
  }
  std::stable_sort(seen.begin(), seen.end(),
                   [](const SeenKey& a, const SeenKey& b) { return a.first < b.first; });
  // sqrt(tiles) groups of sqrt(tiles) tiles each: a tile then spans about 1 / sqrt(tiles) of the
  // first rows and of the last rows.
  const double tiles = std::ceil(static_cast<double>(seen.size()) / tile_columns);
  const auto groups = std::max<size_t>(1, static_cast<size_t>(std::lround(std::sqrt(tiles))));
  for (size_t g = 0; g < groups; ++g) {
    const auto at = [&](size_t i) {
      return seen.begin() + static_cast<std::ptrdiff_t>(seen.size() * i / groups);
    };
    std::stable_sort(at(g), at(g + 1),
                     [](const SeenKey& a, const SeenKey& b) { return a.last < b.last; });
  }
  for (const SeenKey& key : seen) *order++ = key.key;
  std::copy(dropped.begin(), dropped.end(), order);
}

}  // namespace

void order_keys(const Program& program, int tile_columns, int32_t* order) {
  const int64_t orders = program.heads / program.order_divisor;
  parallel_for(program.batches * orders, [&](int64_t index, int) {
    order_place(program, static_cast<int>(index / orders),
                static_cast<int>(index % orders) * program.order_divisor, tile_columns,
                order + index * program.kv_len);
  });
}

}  // namespace anymask::cpu
