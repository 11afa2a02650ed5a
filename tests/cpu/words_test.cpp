// The words that the kernels are given, against the rules word by word, on every instruction set.
#include "cpu/words.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/random_masks.h"
#include "mask/lower.h"
#include "problem.h"
#include "rules/evaluate.h"

namespace anymask {
namespace {

void expect_words(const rules::Program& program, const rules::Tile& tile) {
  std::vector<uint32_t> words(cpu::kTileWords, 0x5a5a5a5au);
  for (int head = 0; head < program.heads; ++head) {
    cpu::tile_words(program, {0, head}, tile, words.data());
    const int keys = tile.column_end - tile.column_begin;
    for (int row = tile.row_begin; row < tile.row_end; row += 32) {
      const uint32_t* found = words.data() + (row - tile.row_begin) / 32 * cpu::kWordsStride;
      const uint32_t exist = rules::run_word(tile.row_begin, tile.row_end, row);
      for (int i = 0; i < (keys + 31) / 32 * 32; ++i) {
        const uint32_t truth =
            i < keys ? column_word(program, {0, head}, tile.column_begin + i, row) & exist : 0u;
        ASSERT_EQ(found[i], truth)
            << "head " << head << " row " << row << " key " << tile.column_begin + i;
      }
    }
  }
}

template <class Body>
void on_every_instruction_set(const Body& body) {
  const std::string before = cpu_instruction_set();
  for (const std::string& name : cpu_instruction_sets()) {
    SCOPED_TRACE(name);
    set_cpu_instruction_set(name);
    body();
  }
  set_cpu_instruction_set(before);
}

TEST(Words, RandomTrees) {
  on_every_instruction_set([] {
    for (unsigned seed = 0; seed < 60; ++seed) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed);
      RandomMasks random(seed);
      const int q_len = random.between(1, 300), kv_len = random.between(1, 300);
      const Mask mask = random.tree(random.between(1, 5), q_len, kv_len);
      rules::Program program = lower(mask, small_problem(q_len, kv_len, 1, 2));
      std::vector<int32_t> order(static_cast<size_t>(kv_len));
      std::iota(order.rbegin(), order.rend(), 0);
      if (seed % 2 == 0) program.key_order = order.data();
      program.order_divisor = program.heads;
      for (int trial = 0; trial < 5; ++trial) {
        const int row = random.between(0, (q_len - 1) / 32) * 32;
        const int key = random.between(0, kv_len - 1);
        expect_words(program, {row, std::min(row + random.between(1, 256), q_len), key,
                               std::min(key + random.between(1, 256), kv_len)});
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  });
}

TEST(Words, IntervalsOfTheLargestNumbers) {
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> runs;
  for (const int32_t a : {kLeast, kLeast + 1, 0, 33, kMost}) {
    for (const int32_t b : {kLeast, 32, 64, kMost}) runs.insert(runs.end(), {a, b, b, a});
  }
  const int keys = static_cast<int>(runs.size()) / 4;
  const Mask mask = intervals(Tensor(runs.data(), DType::i32, {1, 1, keys, 4}), false);
  const rules::Program program = lower(mask, small_problem(100, keys));
  on_every_instruction_set([&] { expect_words(program, {0, 100, 0, keys}); });
}

}  // namespace
}  // namespace anymask
