// Kernels that build tile maps: classify the tiles, count the visible ones, order the work.
//
// `classify` asks the mask program about one key's column at a time: a column's class over a run of
// rows costs a few instructions whatever the mask, the columns of a warp's lanes are neighbours in
// memory, and classes joined column by column are sharper than those of a whole tile. Beside what a
// tile may hold it tracks what it surely holds; only where the two differ does it look at the
// pairs, so the result is exact. Looks go from large to small: a block's tiles, spans of eight,
// one.
#pragma once

#include "cuda/device/plan_params.h"
#include "rules/known.h"

namespace anymask::cuda {

inline int warp_index() { return static_cast<int>(threadIdx.x / 32); }
inline int lane_index() { return static_cast<int>(threadIdx.x % 32); }

// ---- ids: what the rows of a span hold, found once for all columns ------------------------------
//
// rules::ids_class walks the rows for every tile it is asked about; asked column by column that
// would be as many steps as there are pairs. The block keeps each span's summary instead.

inline rules::IdRange id_range(const rules::Node& node, int row_begin, int row_end) {
  rules::IdRange range = rules::kNoIds;
  for (int row = row_begin + lane_index(); row < row_end; row += 32) {
    range.add(rules::id_of_row(node, {0, 0}, row));
  }
  for (int step = 16; step > 0; step /= 2) {
    range.add({__shfl_xor_sync(kWholeWarp, range.least, step),
               __shfl_xor_sync(kWholeWarp, range.most, step),
               __shfl_xor_sync(kWholeWarp, range.any_closed, step) != 0,
               __shfl_xor_sync(kWholeWarp, range.any_open, step) != 0});
  }
  return range;
}

// ---- classify -----------------------------------------------------------------------------------

inline constexpr int kMaxIdLeaves = (rules::kMaxNodes + 1) / 2;
inline constexpr int kSpans = kBlockRowTiles / kSpanTiles;
inline constexpr int kIdRanges = kBlockRowTiles + kSpans + 1;

// What the warps of a block share.
struct ClassifyBlock {
  rules::Program program;  // its arrays moved to this block's place: asked about at {0, 0}
  rules::IdRange ids[kMaxIdLeaves][kIdRanges];  // of each row tile, each span, the whole block
  uint32_t visible[kBlockKeyTiles];             // a bit for each row tile
  uint32_t hidden[kBlockKeyTiles];
  uint32_t whole;     // what is known of all its tiles together
  int32_t key_tiles;  // with keys that some row may see
  int32_t task_count;
  int32_t doubt_count;
  uint8_t tasks[kBlockRowTiles * kBlockKeyTiles];   // tiles still to look at: row * 8 + key
  uint8_t doubts[kBlockRowTiles * kBlockKeyTiles];  // tiles whose class their parts leave open
};

inline void move_to_place(rules::Array& array, rules::Place place) {
  const int64_t offset =
      place.batch * array.batch_stride + (place.head / array.head_divisor) * array.head_stride;
  if (array.data != nullptr) {
    array.data = static_cast<const char*>(array.data) + offset * array.bytes;
  }
}

// Which order of keys a place has.
inline int64_t order_of(const rules::Program& program, rules::Place place) {
  const int64_t orders = program.heads / program.order_divisor;
  return place.batch * orders + place.head / program.order_divisor;
}

inline void start_block(const ClassifyParams& params, const ClassifyPass& pass, rules::Place place,
                        ClassifyBlock& block) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < params.program.count) {
    rules::Node node = params.program.nodes[thread];
    move_to_place(node.rows, place);
    move_to_place(node.columns, place);
    block.program.nodes[thread] = node;
  }
  if (thread < kBlockKeyTiles) block.visible[thread] = block.hidden[thread] = 0;
  if (thread == 0) {
    block.program.count = params.program.count;
    block.program.heads = block.program.order_divisor = 1;
    block.program.q_len = params.program.q_len;
    block.program.kv_len = params.program.kv_len;
    block.program.key_order = nullptr;
    block.key_tiles = pass.key_tiles;
    if (params.program.key_order != nullptr) {
      const int64_t order = order_of(params.program, place);
      block.program.key_order = params.program.key_order + order * params.program.kv_len;
      const int columns = pass.shape.columns;
      block.key_tiles = (params.seen_keys[order] + columns - 1) / columns;
    }
    block.whole = 0;
    block.task_count = block.doubt_count = 0;
  }
  __syncthreads();
}

inline void summarize_ids(const ClassifyPass& pass, int first_tile, ClassifyBlock& block) {
  int leaf = 0;
  for (int i = 0; i < block.program.count; ++i) {
    const rules::Node& node = block.program.nodes[i];
    if (node.op != rules::Op::kIds) continue;
    for (int tile = warp_index(); tile < kBlockRowTiles; tile += kClassifyWarps) {
      const int row = (first_tile + tile) * pass.shape.rows;
      const int end = rules::min_of(row + pass.shape.rows, block.program.q_len);
      const rules::IdRange range = id_range(node, row, end);
      if (lane_index() == 0) block.ids[leaf][tile] = range;
    }
    ++leaf;
  }
  if (leaf == 0) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < leaf * (kSpans + 1); i += kClassifyThreads) {
    rules::IdRange* ranges = block.ids[i / (kSpans + 1)];
    const int span = i % (kSpans + 1);
    const int first = span < kSpans ? span * kSpanTiles : 0;
    const int end = span < kSpans ? first + kSpanTiles : kBlockRowTiles;
    rules::IdRange all = rules::kNoIds;
    for (int tile = first; tile < end; ++tile) all.add(ranges[tile]);
    ranges[kBlockRowTiles + span] = all;
  }
  __syncthreads();
}

// What is known of one key's column over the rows of a tile or span.
inline rules::Known column_known(const ClassifyBlock& block, const rules::Tile& tile,
                                 int id_index) {
  int id_leaf = 0;
  return rules::evaluate<rules::JoinKnown>(
      block.program, [&](const rules::Node& node) -> rules::Known {
        switch (node.op) {
          case rules::Op::kIds: {
            const int64_t at = tile.column_begin * node.columns.row_stride;
            const int64_t id = rules::load_integer(node.columns, {0, 0}, at);
            return rules::ids_known(block.ids[id_leaf++][id_index], id, id);
          }
          case rules::Op::kDense:  // a plan has packed it: kBits
            return 0;
          default:
            return rules::surely(rules::leaf_class(node, {0, 0}, tile));
        }
      });
}

// A warp looks at rows x columns (positions); stops when `enough` has been seen.
inline rules::Known look(const ClassifyBlock& block, const rules::Tile& tile, int id_index,
                         rules::Known enough) {
  rules::Known found = 0;
  for (int begin = tile.column_begin; begin < tile.column_end && (found & enough) != enough;
       begin += 32) {
    const int position = begin + lane_index();
    rules::Known mine = 0;
    if (position < tile.column_end) {
      const int key = rules::key_at(block.program, {0, 0}, position);
      mine = column_known(block, {tile.row_begin, tile.row_end, key, key + 1}, id_index);
    }
    found |= __reduce_or_sync(kWholeWarp, mine);
  }
  return found;
}

// The class that the pairs of 32 rows of a tile make, `first` a multiple of 32.
inline rules::TileClass look_at_pairs(const ClassifyBlock& block, const rules::Tile& tile,
                                      int first) {
  const uint32_t rows = rules::run_word(tile.row_begin, tile.row_end, first);
  rules::TileClass found = 0;
  for (int begin = tile.column_begin; begin < tile.column_end && found != rules::kSome;
       begin += 32) {
    const int position = begin + lane_index();
    rules::TileClass mine = 0;
    if (position < tile.column_end) {
      mine = rules::class_of_word(rules::column_word(block.program, {0, 0}, position, first), rows);
    }
    found |= __reduce_or_sync(kWholeWarp, mine);
  }
  return found;
}

// The rows and columns of `count` row tiles from `row_tile` on, times a key tile.
inline rules::Tile tile_at(const ClassifyPass& pass, const rules::Program& program, int row_tile,
                           int count, int key_tile) {
  const int row = row_tile * pass.shape.rows;
  const int column = key_tile * pass.shape.columns;
  return {row, rules::min_of(row + count * pass.shape.rows, program.q_len), column,
          rules::min_of(column + pass.shape.columns, program.kv_len)};
}

// Lane 0 notes the class of `count` row tiles of the block.
inline void note(ClassifyBlock& block, int key, int first, int count, rules::TileClass value) {
  if (lane_index() != 0) return;
  const uint32_t bits = rules::low_bits(count) << first;
  if (value & rules::kVisible) atomicOr(&block.visible[key], bits);
  if (value & rules::kHidden) atomicOr(&block.hidden[key], bits);
}

// All tiles at once, each warp a part of the columns; true when that settles the block.
inline bool look_at_block(const ClassifyPass& pass, int first_row, int first_key,
                          ClassifyBlock& block) {
  const int rows = rules::min_of(kBlockRowTiles, pass.row_tiles - first_row);
  const int keys = rules::min_of(kBlockKeyTiles, block.key_tiles - first_key);
  if (pass.look_at_block == 0 || keys <= 0) return keys <= 0;
  rules::Tile tile = tile_at(pass, block.program, first_row, rows, first_key);
  const int column_end =
      rules::min_of(tile.column_begin + keys * pass.shape.columns, block.program.kv_len);
  const int part = (column_end - tile.column_begin + kClassifyWarps - 1) / kClassifyWarps;
  tile.column_begin += warp_index() * part;
  tile.column_end = rules::min_of(tile.column_begin + part, column_end);
  const rules::Known mine = look(block, tile, kIdRanges - 1, rules::kSome);
  if (lane_index() == 0) atomicOr(&block.whole, mine);
  __syncthreads();
  const rules::TileClass found = rules::may_hold(block.whole);
  if (found == rules::kSome) return false;
  if (warp_index() < keys) note(block, warp_index(), 0, rows, found);
  return true;
}

inline void look_at_spans(const ClassifyPass& pass, int first_row, int first_key,
                          ClassifyBlock& block) {
  for (int i = warp_index(); i < kSpans * kBlockKeyTiles; i += kClassifyWarps) {
    const int key = i % kBlockKeyTiles;
    const int span = i / kBlockKeyTiles;
    const int row = span * kSpanTiles;
    const int count = rules::min_of(kSpanTiles, pass.row_tiles - first_row - row);
    if (count <= 0 || first_key + key >= block.key_tiles) continue;
    rules::TileClass found = rules::kSome;
    if (pass.look_at_spans != 0 && count > 1) {
      const rules::Tile tile =
          tile_at(pass, block.program, first_row + row, count, first_key + key);
      found = rules::may_hold(look(block, tile, kBlockRowTiles + span, rules::kSome));
    }
    if (found != rules::kSome) {
      note(block, key, row, count, found);
      continue;
    }
    int at = 0;
    if (lane_index() == 0) at = atomicAdd(&block.task_count, count);
    at = __shfl_sync(kWholeWarp, at, 0);
    if (lane_index() < count) {
      block.tasks[at + lane_index()] =
          static_cast<uint8_t>((row + lane_index()) * kBlockKeyTiles + key);
    }
  }
}

inline void look_at_tiles(const ClassifyPass& pass, int first_row, int first_key,
                          ClassifyBlock& block) {
  for (int i = warp_index(); i < block.task_count; i += kClassifyWarps) {
    const int row = block.tasks[i] / kBlockKeyTiles;
    const int key = block.tasks[i] % kBlockKeyTiles;
    const rules::Tile tile = tile_at(pass, block.program, first_row + row, 1, first_key + key);
    const rules::Known known = look(block, tile, row, rules::kSome * rules::kSurely);
    note(block, key, row, 1, rules::surely_holds(known));
    if (rules::may_hold(known) != rules::surely_holds(known) && lane_index() == 0) {
      block.doubts[atomicAdd(&block.doubt_count, 1)] = block.tasks[i];
    }
  }
}

// Tiles that may hold more than they surely do, each shared by several warps.
inline void settle_doubts(const ClassifyPass& pass, int first_row, int first_key,
                          ClassifyBlock& block) {
  const int words = (pass.shape.rows + rules::kWordRows - 1) / rules::kWordRows + 1;
  for (int i = warp_index(); i < block.doubt_count * words; i += kClassifyWarps) {
    const int row = block.doubts[i / words] / kBlockKeyTiles;
    const int key = block.doubts[i / words] % kBlockKeyTiles;
    const rules::Tile tile = tile_at(pass, block.program, first_row + row, 1, first_key + key);
    const int first = (tile.row_begin / rules::kWordRows + i % words) * rules::kWordRows;
    if (first < tile.row_end) note(block, key, row, 1, look_at_pairs(block, tile, first));
  }
}

inline void classify(const ClassifyParams& params) {
  alignas(16) __shared__ unsigned char storage[sizeof(ClassifyBlock)];
  ClassifyBlock& block = *reinterpret_cast<ClassifyBlock*>(storage);
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // for count_tiles, which adds
    for (const ClassifyPass& pass : params.passes) {
      if (pass.column_map.total != nullptr) *pass.column_map.total = 0;
    }
  }
  const int second = static_cast<int>(blockIdx.x) >= params.passes[0].blocks ? 1 : 0;
  const ClassifyPass& pass = params.passes[second];
  const int index = static_cast<int>(blockIdx.x) - second * params.passes[0].blocks;
  const int key_group = index % pass.key_groups;
  const int row_group = index / pass.key_groups % pass.row_groups;
  const int64_t place = index / pass.key_groups / pass.row_groups;
  const int first_row = row_group * kBlockRowTiles;
  const int first_key = key_group * kBlockKeyTiles;

  start_block(params, pass,
              {static_cast<int>(place / params.program.heads),
               static_cast<int>(place % params.program.heads)},
              block);
  summarize_ids(pass, first_row, block);
  if (!look_at_block(pass, first_row, first_key, block)) {
    look_at_spans(pass, first_row, first_key, block);
    __syncthreads();
    look_at_tiles(pass, first_row, first_key, block);
    __syncthreads();
    settle_doubts(pass, first_row, first_key, block);
  }
  __syncthreads();

  if (warp_index() != 0) return;
  const int lane = lane_index();
  if (lane < kBlockKeyTiles) {
    // Columns beyond kv_len must be masked, so a tile that has some needs its bits.
    const int key_tile = first_key + lane;
    const bool beyond_keys = (key_tile + 1) * pass.shape.columns > params.program.kv_len;
    block.hidden[lane] =
        beyond_keys ? block.visible[lane] : block.hidden[lane] & block.visible[lane];
    const plan::TileMap& map = pass.column_map;
    if (map.visible != nullptr && key_tile < pass.key_tiles) {
      const int64_t at = (place * map.outer_tiles + key_tile) * map.words + row_group;
      map.visible[at] = block.visible[lane];
      map.hidden[at] = block.hidden[lane];
    }
  }
  __syncwarp();
  const plan::TileMap& map = pass.row_map;
  const int row_tile = first_row + lane;
  if (map.visible == nullptr || row_tile >= pass.row_tiles) return;
  uint32_t visible = 0, hidden = 0;
  for (int key = 0; key < kBlockKeyTiles; ++key) {
    visible |= (block.visible[key] >> lane & 1u) << key;
    hidden |= (block.hidden[key] >> lane & 1u) << key;
  }
  const int64_t at = (place * map.outer_tiles + row_tile) * map.words * 4 + key_group;
  reinterpret_cast<uint8_t*>(map.visible)[at] = static_cast<uint8_t>(visible);
  reinterpret_cast<uint8_t*>(map.hidden)[at] = static_cast<uint8_t>(hidden);
}

// ---- count and order ----------------------------------------------------------------------------

// The outer tile that this warp works for: `row` counts outer tiles across places.
struct OuterTile {
  const plan::TileMap* map;  // nullptr: none left for this warp
  int64_t row;
};

inline OuterTile outer_tile(const OrderParams& params) {
  int64_t row = int64_t{blockIdx.x} * kOrderWarps + threadIdx.x / 32;
  for (int i = 0; i < params.map_count; ++i) {
    const int64_t rows = int64_t{params.places} * params.maps[i].outer_tiles;
    if (row < rows) return {&params.maps[i], row};
    row -= rows;
  }
  return {nullptr, 0};
}

inline void count_tiles(const OrderParams& params) {
  const auto [map, row] = outer_tile(params);
  if (map == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int count = 0;
  for (int word = lane; word < map->words; word += 32) {
    count += __popc(map->visible[row * map->words + word]);
  }
  count = __reduce_add_sync(kWholeWarp, count);
  if (lane != 0) return;
  map->count[row] = count;
  if (map->total != nullptr) {
    atomicAdd(reinterpret_cast<unsigned long long*>(map->total),
              static_cast<unsigned long long>(count));
  }
}

// A tile's place in the order is the number of tiles that go before it.
inline void order_tiles(const OrderParams& params) {
  const auto [map, row] = outer_tile(params);
  if (map == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tiles = map->outer_tiles;
  const int tile = static_cast<int>(row % tiles);
  const int* counts = map->count + (row - tile);
  const int mine = counts[tile];
  int before = 0;
  for (int other = lane; other < tiles; other += 32) {
    before += counts[other] > mine || (counts[other] == mine && other < tile);
  }
  before = __reduce_add_sync(kWholeWarp, before);
  if (lane == 0) map->order[row - tile + before] = tile;
}

}  // namespace anymask::cuda
