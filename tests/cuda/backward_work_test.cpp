// How the work of a backward pass is shared out, which is decided before the mask is known.
#include "cuda/backward_work.h"

#include <gtest/gtest.h>

#include "cuda/backward_variants.h"

namespace anymask::cuda {
namespace {

// Enough items to fill every multiprocessor several times.
Problem problem(int64_t head_dim, int64_t length, int64_t kv_heads = 32) {
  return {.batch = 4,
          .q_heads = 32,
          .kv_heads = kv_heads,
          .q_len = length,
          .kv_len = length,
          .head_dim = head_dim,
          .v_head_dim = head_dim,
          .dtype = DType::bf16};
}

TEST(BackwardWork, PartsOfDqMeetInOrderWhereThatIsAskedFor) {
  for (const int64_t head_dim : {8, 64, 128, 256}) {
    for (const int64_t length : {1, 1000, 9000}) {
      for (const int32_t features : {0, kSoftcap, kBias}) {
        EXPECT_EQ(chained_by(problem(head_dim, length), true, features), kOrdered);
      }
    }
  }
}

TEST(BackwardWork, ElseTheFastestWayServes) {
  for (const int64_t length : {1000, 9000}) {
    EXPECT_EQ(chained_by(problem(64, length), false, 0), kLoose);
    EXPECT_EQ(chained_by(problem(40, length), false, 0), kLoose);
    EXPECT_EQ(chained_by(problem(136, length), false, 0), kLoose);
    EXPECT_EQ(chained_by(problem(256, length), false, 0), kLoose);
    for (const int32_t feature : {kSoftcap, kKeyBias, kBias, kDropout}) {
      EXPECT_EQ(chained_by(problem(64, length), false, feature), kUnchained);
    }
  }
  EXPECT_EQ(chained_by(problem(128, 2048), false, 0), kOrdered);
  EXPECT_EQ(chained_by(problem(128, 2049), false, 0), kUnchained);
  EXPECT_EQ(chained_by(problem(128, 2048, 8), false, 0), kUnchained) << "grouped heads";
  Problem few = problem(64, 2048);
  few.batch = 1;
  few.q_heads = few.kv_heads = 8;
  EXPECT_EQ(chained_by(few, false, 0), kUnchained) << "few items";
}

TEST(BackwardWork, QueryHeadsAreItemsWhereGroupsDoNotFitTheCacheOrItemsAreFew) {
  EXPECT_FALSE(divides_items(problem(128, 8192)));
  EXPECT_TRUE(divides_items(problem(128, 8192, 8)));
  EXPECT_FALSE(divides_items(problem(128, 2048, 8)));
  Problem few = problem(128, 4096);
  few.batch = 1;
  few.q_heads = few.kv_heads = 2;  // 64 items of 64 row tiles
  EXPECT_TRUE(divides_items(few));
  EXPECT_EQ(chained_by(few, false, 0), kUnchained);
  // Nine segments would give each multiprocessor four items.
  EXPECT_EQ(segment_tiles(few, false), 8);
  few.q_len = 640;
  EXPECT_FALSE(divides_items(few)) << "short items are not worth two launches";
  EXPECT_EQ(segment_tiles(few, false), 4);
  EXPECT_EQ(segment_tiles(problem(128, 32768), true), 64);
  EXPECT_EQ(segment_tiles(problem(128, 32768), false), 512);
}

TEST(BackwardWork, ChunksFillPartOfTheCache) {
  Gpu gpu{};
  gpu.multiprocessors = 132;
  gpu.l2_bytes = 50 << 20;
  const Problem p = problem(128, 8192);
  const BackwardConfig plain = backward_variant(128, 128, false, MaskPath::kRuns, kUnchained);
  const Chunks chunks(p, plain, gpu, 127, 64, 1);
  EXPECT_EQ(chunks.size, 2);  // of 8 MiB each
  EXPECT_EQ(chunks.tail, 9);  // 8 fill the device; before them, whole chunks
  EXPECT_EQ((127 - chunks.tail) % chunks.size, 0);
  EXPECT_TRUE(chunks.blocks_fit) << "three pairs";
  const Problem grouped = problem(128, 8192, 8);
  const BackwardConfig chained = backward_variant(128, 128, false, MaskPath::kRuns, kOrdered);
  const Chunks one(grouped, chained, gpu, 32, 64, 1);
  EXPECT_EQ(one.size, 1);
  EXPECT_FALSE(one.blocks_fit);
  const Problem short_rows = problem(128, 1024, 8);  // 4 MiB a pair
  const Chunks four(short_rows, plain, gpu, 128, 8, 1);
  EXPECT_EQ(four.size, 5);
  EXPECT_EQ(four.tail, 18) << "a group's items are four heads' work";
}

}  // namespace
}  // namespace anymask::cuda
