// Kernels that build tile maps: classify the tiles, count the visible ones, order the work.
//
// `classify` asks the mask program about one key column at a time: a column's class over a run of
// rows costs a few instructions whatever the mask, columns of a warp's lanes are neighbours in
// memory, and classes joined column by column are sharper than those of a whole tile. A strip of 32
// row tiles is asked about first; only a strip (then a quarter of it) that is neither hidden nor
// visible throughout is looked at tile by tile. Tiles that are `some` by their parts' classes are
// settled by their pairs, which takes one or two looks: the result is exact.
#pragma once

#include "cuda/device/plan_params.h"
#include "rules/evaluate.h"

namespace anymask::cuda {

inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// ---- ids: what the rows of a span hold, found once for all columns ---------------------------------
//
// rules::ids_class walks the rows for every tile it is asked about; asked column by column that
// would be as many steps as there are pairs. The block keeps each span's summary instead.

struct IdRange {
  int64_t least, most;  // of the rows that match by value
  bool any_closed;      // there are such rows
  bool any_open;        // there are rows that see every column

  void add(const IdRange& other) {
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
    any_closed |= other.any_closed;
    any_open |= other.any_open;
  }
};
inline constexpr IdRange kNoIds = {0x7fffffffffffffff, -0x7fffffffffffffff - 1, false, false};

inline constexpr int kMaxIdLeaves = (rules::kMaxNodes + 1) / 2;
inline constexpr int kSpans = kClassifyRowTiles + 4 + 1;  // spans of 1, 8 and 32 row tiles

inline int span_index(int first, int span) {
  return span == 1 ? first : span == 8 ? kClassifyRowTiles + first / 8 : kSpans - 1;
}

inline IdRange id_range(const rules::Node& node, rules::Place place, int row_begin, int row_end) {
  IdRange range = kNoIds;
  for (int row = row_begin + static_cast<int>(threadIdx.x % 32); row < row_end; row += 32) {
    const int64_t id = rules::load_integer(node.rows, place, row * node.rows.row_stride);
    const bool open = node.flag != 0 && id >= 0;
    range.add(open ? IdRange{kNoIds.least, kNoIds.most, false, true} : IdRange{id, id, true, false});
  }
  for (int step = 16; step > 0; step /= 2) {
    range.add({__shfl_xor_sync(kWholeWarp, range.least, step),
               __shfl_xor_sync(kWholeWarp, range.most, step),
               __shfl_xor_sync(kWholeWarp, range.any_closed, step) != 0,
               __shfl_xor_sync(kWholeWarp, range.any_open, step) != 0});
  }
  return range;
}

inline rules::TileClass id_range_class(const IdRange& range, int64_t id) {
  const bool meets = range.least <= id && id <= range.most;
  const bool all_equal = range.least == id && range.most == id;
  return (range.any_open ? rules::kVisible : 0u) |
         (range.any_closed ? rules::class_of(meets, !all_equal) : 0u);
}

// ---- classify ----------------------------------------------------------------------------------------

struct IdTable {
  IdRange ranges[kMaxIdLeaves][kSpans];
};

inline void fill_id_table(const ClassifyParams& params, rules::Place place, int first_tile,
                          IdTable& table) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  int leaf = 0;
  for (int i = 0; i < params.program.count; ++i) {
    const rules::Node& node = params.program.nodes[i];
    if (node.op != rules::Op::kIds) continue;
    for (int tile = warp; tile < kClassifyRowTiles; tile += kClassifyWarps) {
      const int row = (first_tile + tile) * params.shape.rows;
      const int end = rules::min_of(row + params.shape.rows, params.program.q_len);
      const IdRange range = id_range(node, place, row, end);
      if (lane == 0) table.ranges[leaf][tile] = range;
    }
    ++leaf;
  }
  if (leaf == 0) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < leaf * 5; i += kClassifyThreads) {
    const int part = i % 5;  // a quarter of the strip, or (4) all of it
    IdRange range = kNoIds;
    for (int tile = part < 4 ? part * 8 : 0; tile < (part < 4 ? part * 8 + 8 : 32); ++tile) {
      range.add(table.ranges[i / 5][tile]);
    }
    table.ranges[i / 5][kClassifyRowTiles + part] = range;
  }
  __syncthreads();
}

// The class of one key's column over the rows of a span. As rules::key_class, but for ids.
inline rules::TileClass column_class(const rules::Program& program, rules::Place place,
                                     const rules::Tile& tile, const IdTable& table, int span) {
  rules::Stack stack;
  int leaf = 0;
  for (int i = 0; i < program.count; ++i) {
    const rules::Node& node = program.nodes[i];
    switch (node.op) {
      case rules::Op::kNot: stack.top = rules::class_not(stack.top); break;
      case rules::Op::kAnd: stack.join(rules::class_and(stack.top, stack.second)); break;
      case rules::Op::kOr: stack.join(rules::class_or(stack.top, stack.second)); break;
      case rules::Op::kIds: {
        const int64_t id = rules::load_integer(node.columns, place,
                                               tile.column_begin * node.columns.row_stride);
        stack.push(id_range_class(table.ranges[leaf++][span], id));
        break;
      }
      default: stack.push(rules::leaf_class(node, place, tile)); break;
    }
  }
  return stack.top;
}

// The two words of one key tile: a bit for each of 32 row tiles.
struct TileWords {
  uint32_t visible;
  uint32_t hidden;

  void fill(int first, int count, rules::TileClass value) {
    const uint32_t bits = rules::low_bits(count) << first;
    if (value & rules::kVisible) visible |= bits;
    if (value & rules::kHidden) hidden |= bits;
  }
};

// The class that the pairs of a tile make, up to the first visible and hidden one.
inline rules::TileClass pairs_class(const rules::Program& program, rules::Place place,
                                    const rules::Tile& tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  rules::TileClass found = 0;
  for (int first = tile.row_begin / rules::kWordRows * rules::kWordRows;
       first < tile.row_end && found != rules::kSome; first += rules::kWordRows) {
    const uint32_t rows = rules::run_word(tile.row_begin, tile.row_end, first);
    for (int begin = tile.column_begin; begin < tile.column_end && found != rules::kSome;
         begin += 32) {
      const int column = begin + lane;
      const uint32_t word =
          column < tile.column_end ? rules::column_word(program, place, column, first) : 0u;
      const rules::TileClass mine =
          column < tile.column_end ? rules::class_of_word(word, rows) : 0u;
      found |= __reduce_or_sync(kWholeWarp, mine);
    }
  }
  return found;
}

inline TileWords classify_key_tile(const ClassifyParams& params, rules::Place place, int key_tile,
                                   int first_tile, const IdTable& table) {
  const rules::Program& program = params.program;
  const int column_begin = key_tile * params.shape.columns;
  const int column_end = rules::min_of(column_begin + params.shape.columns, program.kv_len);
  const int tiles = rules::min_of(kClassifyRowTiles, params.row_tiles - first_tile);
  TileWords words = {0, 0};
  int span = params.widest_span;
  for (int first = 0; first < tiles;) {
    const int row_begin = (first_tile + first) * params.shape.rows;
    const int row_end = rules::min_of(row_begin + span * params.shape.rows, program.q_len);
    rules::TileClass mine = 0;
    for (int position = column_begin + static_cast<int>(threadIdx.x % 32);
         position < column_end && mine != rules::kSome; position += 32) {
      const int key = rules::key_at(program, place, position);
      mine |= column_class(program, place, {row_begin, row_end, key, key + 1}, table,
                           span_index(first, span));
    }
    rules::TileClass found = __reduce_or_sync(kWholeWarp, mine);
    if (found == rules::kSome && span > 1) {
      span = span == 32 ? 8 : 1;
      continue;
    }
    if (found == rules::kSome && params.look_at_pairs) {
      found = pairs_class(program, place, {row_begin, row_end, column_begin, column_end});
    }
    words.fill(first, rules::min_of(span, tiles - first), found);
    first += span;
    if (first % 8 == 0) span = rules::min_of(params.widest_span, 8);
  }
  // Columns beyond kv_len must be masked, so a tile that has some needs its bits.
  const bool beyond_keys = column_begin + params.shape.columns > program.kv_len;
  words.hidden = beyond_keys ? words.visible : words.hidden & words.visible;
  return words;
}

inline void classify(const ClassifyParams& params) {
  __shared__ IdTable table;
  __shared__ TileWords block_words[kClassifyWarps];
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int key_group = static_cast<int>(blockIdx.x % params.key_groups);
  const int rest = static_cast<int>(blockIdx.x / params.key_groups);
  const int row_group = rest % params.row_groups;
  const int place_index = rest / params.row_groups;
  const rules::Place place = {place_index / params.program.heads,
                              place_index % params.program.heads};
  const int first_tile = row_group * kClassifyRowTiles;
  const int key_tile = key_group * kClassifyWarps + warp;

  fill_id_table(params, place, first_tile, table);
  TileWords words = {0, 0};
  if (key_tile < params.key_tiles) {
    words = classify_key_tile(params, place, key_tile, first_tile, table);
    const plan::TileMap& map = params.column_map;
    if (map.visible != nullptr && lane == 0) {
      const int64_t at = (int64_t{place_index} * map.outer_tiles + key_tile) * map.words + row_group;
      map.visible[at] = words.visible;
      map.hidden[at] = words.hidden;
    }
  }
  if (lane == 0) block_words[warp] = words;
  __syncthreads();

  // Transpose: eight key tiles make one byte of each row tile's word.
  const plan::TileMap& map = params.row_map;
  const int row_tile = first_tile + lane;
  if (map.visible == nullptr || warp >= 2 || row_tile >= params.row_tiles) return;
  uint32_t byte = 0;
  for (int i = 0; i < kClassifyWarps; ++i) {
    const uint32_t word = warp == 0 ? block_words[i].visible : block_words[i].hidden;
    byte |= ((word >> lane) & 1u) << i;
  }
  uint8_t* bytes = reinterpret_cast<uint8_t*>(warp == 0 ? map.visible : map.hidden);
  const int64_t row = int64_t{place_index} * map.outer_tiles + row_tile;
  bytes[row * map.words * 4 + key_group] = static_cast<uint8_t>(byte);
}

// ---- count and order -----------------------------------------------------------------------------------

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
  if (lane == 0) map->count[row] = count;
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
