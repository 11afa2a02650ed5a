// Which key tiles a block of the forward kernel walks where row tiles are cut, run on the CPU
// thread by thread. Needs no GPU.
#include "cuda/emulator.h"
//
#define __device__
#define __forceinline__ inline

namespace anymask::ptx {

using cuda::__syncwarp;

// Nobody comes to what is in assembly.
inline uint64_t __cvta_generic_to_shared(const void*) { return 0; }

}  // namespace anymask::ptx

#include <gtest/gtest.h>

#include <random>
#include <tuple>

#include "cuda/device/sm90/schedule.h"

namespace anymask::cuda {
namespace {

constexpr ForwardConfig config(int halves) {
  ForwardConfig c{};
  c.depth = c.value_depth = 64;
  c.warpgroups = 2;
  c.columns = 128;
  c.cuts = 1;
  c.halves = halves;
  return c;
}

// A map of random tiles, of which row tiles see many, some or none.
struct RandomMap {
  std::vector<uint32_t> words;
  std::vector<int32_t> counts;

  RandomMap(std::mt19937& random, int row_tiles, int key_tiles) {
    const int row_words = (key_tiles + 31) / 32;
    words.resize(static_cast<size_t>(2 * row_tiles * row_words));  // visible, then hidden
    for (int row = 0; row < row_tiles; ++row) {
      const unsigned chance = random() % 3 == 0 ? 0 : static_cast<unsigned>(random() % 101);
      counts.push_back(0);
      for (int tile = 0; tile < key_tiles; ++tile) {
        if (random() % 100 >= chance) continue;
        words[static_cast<size_t>(row * row_words + tile / 32)] |= 1u << (tile % 32);
        ++counts.back();
      }
    }
  }

  plan::TileMap view(int outer_tiles, int inner_tiles) {
    plan::TileMap map{};
    map.visible = words.data();
    map.hidden = words.data() + words.size() / 2;
    map.count = counts.data();
    map.outer_tiles = outer_tiles;
    map.inner_tiles = inner_tiles;
    map.words = (inner_tiles + 31) / 32;
    return map;
  }
};

template <int kHalves>
void walk(std::mt19937& random) {
  constexpr ForwardConfig kConfig = config(kHalves);
  int cut = 0;
  for (int trial = 0; trial < (kHalves != 0 ? 20 : 60); ++trial) {
    const int batch = 1 + static_cast<int>(random() % (kHalves != 0 ? 50 : 2)),
              heads = 1 + static_cast<int>(random() % (kHalves != 0 ? 10 : 4));
    const int outer = kHalves != 0 ? 1 : 1 + static_cast<int>(random() % 16);
    const int inner = 1 + static_cast<int>(random() % 200);
    RandomMap made(random, batch * heads * outer, inner);
    ForwardParams p{};
    p.map = made.view(outer, inner);
    p.program.batches = batch;
    p.program.heads = p.q_heads = heads;
    p.items = batch * heads * outer;
    ASSERT_LE(p.items, kConfig.most_cut());
    p.blocks = 1 + static_cast<int>(random() % 132);
    if (kHalves == 0) p.blocks = std::max(p.items, p.blocks);

    using Place = std::tuple<int, int, int, int>;  // batch, head, row tile, key tile
    std::vector<Place> walked;
    std::vector<int> parts(static_cast<size_t>(p.items));
    std::vector<int32_t> starts(static_cast<size_t>(p.items + 1));
    emulate(p.blocks, 32, [&] {
      const int lane = static_cast<int>(threadIdx.x);
      PartList<kConfig> list{p, starts.data(), lane};
      list.begin();
      for (;;) {
        RowPart part{};
        const Item item = list.next(part);
        if (item.count < 0) break;
        if (lane != 0) continue;
        if (part.parts > 1) {
          EXPECT_EQ(part.first_block + part.index, static_cast<int>(blockIdx.x));
          ++cut;
        }
        EXPECT_LT(part.index, part.parts);
        ++parts[static_cast<size_t>(part.row_tile)];
        const rules::Place place = mask_place(p, item.batch, item.head);
        TileWalker<kConfig> walker(p, item, place, part.first_tile);
        for (int i = 0; i < item.count; ++i) {
          walker.next();
          walked.emplace_back(item.batch, item.head, item.row_tile, walker.tile);
        }
      }
    });

    std::vector<Place> visible;
    for (int row = 0; row < p.items; ++row) {
      for (int tile = 0; tile < inner; ++tile) {
        const uint32_t word = p.map.visible[row * p.map.words + tile / 32];
        if ((word >> (tile % 32) & 1) == 0) continue;
        visible.emplace_back(row / outer / heads, row / outer % heads, row % outer, tile);
      }
      EXPECT_GE(parts[static_cast<size_t>(row)], 1) << "somebody has to write its zeros";
    }
    EXPECT_EQ(walked, visible);
  }
  EXPECT_GT(cut, 100);
}

TEST(ForwardEmulated, BlocksWalkEveryVisibleTileOnce) {
  std::mt19937 random(1);
  walk<0>(random);
}

TEST(ForwardEmulated, OfSingleStripsToo) {
  std::mt19937 random(2);
  walk<1>(random);
}

}  // namespace
}  // namespace anymask::cuda
