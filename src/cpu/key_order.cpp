#include "cpu/key_order.h"

#include <algorithm>
#include <vector>

#include "cpu/threads.h"
#include "rules/key_rows.h"

namespace anymask::cpu {
namespace {

using rules::Program;

struct SeenKey {
  int32_t key;
  rules::KeyRows rows;
};

void order_place(const Program& program, int batch, int order_head, int tile_columns,
                 int32_t* order) {
  std::vector<SeenKey> seen;
  std::vector<int32_t> dropped;
  for (int key = 0; key < program.kv_len; ++key) {
    const rules::KeyRows rows = rules::rows_of_order(program, batch, order_head, key);
    if (rows.last == 0) {
      dropped.push_back(key);
    } else {
      seen.push_back({key, rows});
    }
  }
  std::stable_sort(seen.begin(), seen.end(),
                   [](const SeenKey& a, const SeenKey& b) { return a.rows.first < b.rows.first; });
  const auto groups =
      static_cast<size_t>(rules::group_count(static_cast<int>(seen.size()), tile_columns));
  for (size_t g = 0; g < groups; ++g) {
    const auto at = [&](size_t i) {
      return seen.begin() + static_cast<std::ptrdiff_t>(seen.size() * i / groups);
    };
    std::stable_sort(at(g), at(g + 1),
                     [](const SeenKey& a, const SeenKey& b) { return a.rows.last < b.rows.last; });
  }
  for (const SeenKey& key : seen) *order++ = key.key;
  std::copy(dropped.begin(), dropped.end(), order);
}

}  // namespace

void order_keys(const Program& program, int tile_columns, int32_t* order) {
  const int64_t orders = program.heads / program.order_divisor;
  parallel_for(program.batches * orders, [&](int64_t index, int) {
    order_place(program, static_cast<int>(index / orders), static_cast<int>(index % orders),
                tile_columns, order + index * program.kv_len);
  });
}

}  // namespace anymask::cpu
