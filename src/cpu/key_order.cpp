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
int32_t low_of(uint64_t item) { return static_cast<int32_t>(item & 0xffffffffu); }

// Orders the keys of every place: the steps of cuda/device/key_order.h, with the same result.
class KeyOrder {
 public:
  KeyOrder(const Program& program, int tile_columns, int32_t* order)
      : program_(program),
        keys_(program.kv_len),
        heads_(program.heads / program.order_divisor),
        orders_(program.batches * heads_),
        tile_columns_(tile_columns),
        order_(order),
        rows_(static_cast<size_t>(orders_ * keys_)),
        seen_(static_cast<size_t>(orders_)) {}

  void run() {
    constexpr int64_t kKeys = 4096;  // a task
    parallel_in_groups(orders_ * keys_, kKeys, [&](int64_t index) { see_key(index); });
    parallel_for(orders_, [&](int64_t order, int) { sort_keys(order); });
    const int64_t most_groups = rules::group_count(program_.kv_len, tile_columns_);
    parallel_for(orders_ * most_groups,
                 [&](int64_t task, int) { sort_group(task / most_groups, task % most_groups); });
  }

 private:
  // Which rows see key index % keys of order index / keys.
  void see_key(int64_t index) {
    const int64_t order = index / keys_;
    rows_[static_cast<size_t>(index)] =
        rows_of_order(program_, static_cast<int>(order / heads_), static_cast<int>(order % heads_),
                      static_cast<int>(index % keys_));
  }

  // Keys by first row: those that nobody sees have the row behind the last.
  void sort_keys(int64_t order) {
    const KeyRows* rows = rows_of(order);
    std::vector<uint64_t> items(static_cast<size_t>(keys_));
    for (int64_t key = 0; key < keys_; ++key) {
      items[static_cast<size_t>(key)] = item_of(rows[key].first, key);
      seen_[static_cast<size_t>(order)] += rows[key].last != 0;
    }
    // Under a causal mask they come sorted.
    if (!std::is_sorted(items.begin(), items.end())) std::sort(items.begin(), items.end());
    std::transform(items.begin(), items.end(), order_ + order * keys_, low_of);
  }

  // A group of seen keys by last row, equal ones in the order they have.
  void sort_group(int64_t order, int64_t group) {
    const int64_t seen = seen_[static_cast<size_t>(order)];
    const int64_t groups = rules::group_count(static_cast<int>(seen), tile_columns_);
    if (group >= groups) return;
    int32_t* first = order_ + order * keys_ + seen * group / groups;
    const int64_t size = seen * (group + 1) / groups - seen * group / groups;
    const std::vector<int32_t> keys(first, first + size);
    std::vector<uint64_t> items(keys.size());
    for (int64_t i = 0; i < size; ++i)
      items[static_cast<size_t>(i)] = item_of(rows_of(order)[first[i]].last, i);
    std::sort(items.begin(), items.end());
    std::transform(items.begin(), items.end(), first,
                   [&](uint64_t item) { return keys[static_cast<size_t>(low_of(item))]; });
  }

  KeyRows* rows_of(int64_t order) { return rows_.data() + order * keys_; }

  const Program& program_;
  const int64_t keys_, heads_, orders_;
  const int tile_columns_;
  int32_t* const order_;
  std::vector<KeyRows> rows_;  // [orders][keys]
  std::vector<int64_t> seen_;  // [orders]: keys that some row sees
};

}  // namespace

void order_keys(const Program& program, int tile_columns, int32_t* order) {
  KeyOrder(program, tile_columns, order).run();
}

}  // namespace anymask::cpu
