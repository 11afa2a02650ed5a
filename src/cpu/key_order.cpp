#include "cpu/key_order.h"

#include <algorithm>
#include <vector>

#include "cpu/threads.h"
#include "rules/key_rows.h"

namespace anymask::cpu {
namespace {

using rules::KeyRows;
using rules::Program;

// Items are sorted as one number: a row above, below it what tells equal rows apart.
uint64_t item_of(int32_t row, int64_t low) {
  return static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(low);
}
int32_t row_of(uint64_t item) { return static_cast<int32_t>(item >> 32); }
int32_t low_of(uint64_t item) { return static_cast<int32_t>(item & 0xffffffffu); }

// Orders the keys of every place as rules/key_rows.h says; cuda/device/key_order.h has the same
// result.
class KeyOrder {
 public:
  KeyOrder(const Program& program, int tile_columns, int32_t* order, int32_t* seen_keys)
      : program_(program),
        keys_(program.kv_len),
        heads_(program.heads / program.order_divisor),
        orders_(program.batches * heads_),
        tile_columns_(tile_columns),
        order_(order),
        seen_keys_(seen_keys),
        rows_(static_cast<size_t>(orders_ * keys_)) {}

  void run() {
    std::fill_n(seen_keys_, orders_, 0);
    if (keys_ == 0) return;
    constexpr int64_t kKeysToSee = 4096, kKeysToSort = 16384;  // a task
    parallel_in_groups(orders_ * keys_, kKeysToSee, [&](int64_t index) { see_key(index); });
    parallel_for(orders_, [&](int64_t order, int) { sort_keys(order); });
    const int64_t most_groups = rules::group_count(program_.kv_len, tile_columns_);
    parallel_in_groups(orders_ * most_groups,
                       std::max<int64_t>(1, kKeysToSort * most_groups / keys_), [&](int64_t index) {
                         order_group(index / most_groups, static_cast<int>(index % most_groups));
                       });
  }

 private:
  // Which rows see key index % keys of order index / keys.
  void see_key(int64_t index) {
    const int64_t order = index / keys_;
    rows_[static_cast<size_t>(index)] =
        rows_of_order(program_, static_cast<int>(order / heads_), static_cast<int>(order % heads_),
                      static_cast<int>(index % keys_));
  }

  // Seen keys by first row, then the others.
  void sort_keys(int64_t order) {
    const KeyRows* rows = rows_of(order);
    int32_t* const keys = order_ + order * keys_;
    std::vector<uint64_t> items;
    items.reserve(static_cast<size_t>(keys_));
    for (int64_t key = 0; key < keys_; ++key) {
      if (rows[key].last != 0) items.push_back(item_of(rows[key].first, key));
    }
    // Under a causal mask they come sorted.
    if (!std::is_sorted(items.begin(), items.end())) std::sort(items.begin(), items.end());
    int32_t* end = std::transform(items.begin(), items.end(), keys, low_of);
    for (int32_t key = 0; key < keys_; ++key) {
      if (rows[key].last == 0) *end++ = key;
    }
    seen_keys_[order] = static_cast<int32_t>(items.size());
  }

  void order_group(int64_t order, int group) {
    const int seen = seen_keys_[order];
    if (group >= rules::group_count(seen, tile_columns_)) return;
    int32_t* const keys = order_ + order * keys_;
    halve(rows_of(order), keys + rules::group_begin(seen, tile_columns_, group),
          keys + rules::group_begin(seen, tile_columns_, group + 1));
  }

  // Halves keys that are sorted by first row, or sorts those of a single tile.
  void halve(const KeyRows* rows, int32_t* begin, int32_t* end) const {
    const int tiles = rules::tile_count(static_cast<int>(end - begin), tile_columns_);
    int32_t* const middle = begin + rules::middle_tile(0, tiles) * tile_columns_;
    const std::vector<int32_t> keys(begin, end);
    std::vector<uint64_t> items(keys.size());  // by last row, equal ones as they are
    for (size_t i = 0; i < keys.size(); ++i) {
      items[i] = item_of(rows[keys[i]].last, static_cast<int64_t>(i));
    }
    const auto [least, greatest] = std::minmax_element(items.begin(), items.end());
    const bool by_first = rules::halves_by_first({rows[keys.front()].first, row_of(*least)},
                                                 {rows[keys.back()].first, row_of(*greatest)});
    if (tiles == 1) {
      if (by_first) return;
      std::sort(items.begin(), items.end());
      std::transform(items.begin(), items.end(), begin,
                     [&](uint64_t item) { return keys[static_cast<size_t>(low_of(item))]; });
      return;
    }
    if (!by_first) {
      std::vector<uint64_t> ranked = items;
      const auto pivot = ranked.begin() + (middle - begin);
      std::nth_element(ranked.begin(), pivot, ranked.end());
      int32_t *left = begin, *right = middle;  // either half stays sorted by first row
      for (size_t i = 0; i < keys.size(); ++i) *(items[i] < *pivot ? left : right)++ = keys[i];
    }
    halve(rows, begin, middle);
    halve(rows, middle, end);
  }

  KeyRows* rows_of(int64_t order) { return rows_.data() + order * keys_; }

  const Program& program_;
  const int64_t keys_, heads_, orders_;
  const int tile_columns_;
  int32_t* const order_;
  int32_t* const seen_keys_;
  std::vector<KeyRows> rows_;  // [orders][keys]
};

}  // namespace

void order_keys(const Program& program, int tile_columns, int32_t* order, int32_t* seen_keys) {
  KeyOrder(program, tile_columns, order, seen_keys).run();
}

}  // namespace anymask::cpu
