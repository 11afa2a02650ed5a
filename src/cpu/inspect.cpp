// Looks at a mask pair by pair or tile by tile, on the host: for tests, drawings and statistics.
#include <algorithm>
#include <atomic>
#include <bit>
#include <string>

#include "anymask/plan.hpp"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "mask/describe.h"
#include "mask/lower.h"
#include "rules/evaluate.h"

namespace anymask {
namespace {

using rules::Place;
using rules::Program;
using rules::Tile;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_host(const Problem& problem) {
  if (problem.device.type != DeviceType::cpu) {
    throw InvalidType("mask is on " + device_text(problem.device) + "; move its arrays to the CPU");
  }
}

void check_tile(int64_t rows, int64_t columns) {
  if (rows < 1 || columns < 1 || rows > (1 << 30) || columns > (1 << 30)) {
    throw InvalidValue("tile is " + std::to_string(rows) + " x " + std::to_string(columns) +
                       "; both sizes must be from 1 to 2^30");
  }
}

void check_bytes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dtype != DType::u8) fail_dtype(name, tensor.dtype, "uint8");
  if (tensor.ndim != 4 || !std::equal(shape.begin(), shape.end(), tensor.shape)) {
    fail_shape(name, tensor, shape_text(shape));
  }
  if (tensor.device.type != DeviceType::cpu) {
    throw InvalidType(std::string(name) + " must be on the CPU");
  }
}

Place place_of(const Program& program, int64_t index) {
  return {static_cast<int>(index / program.heads), static_cast<int>(index % program.heads)};
}

// Calls visit(place index, first row, column, word under the rows that exist) for every word.
template <typename Visit>
void for_each_word(const Program& program, const Visit& visit) {
  const int64_t word_rows = ceil_div(program.q_len, rules::kWordRows);
  const int64_t places = int64_t{program.batches} * program.heads;
  cpu::parallel_for(places * word_rows, [&](int64_t task, int) {
    const int64_t place = task / word_rows;
    const int first = static_cast<int>(task % word_rows) * rules::kWordRows;
    const uint32_t rows = rules::run_word(0, program.q_len, first);
    for (int column = 0; column < program.kv_len; ++column) {
      visit(place, first, column,
            column_word(program, place_of(program, place), column, first) & rows);
    }
  });
}

}  // namespace

MaskShape mask_shape(const Mask& mask, const Problem& problem) {
  const Program program = lower(mask, problem);
  return {program.batches, program.heads};
}

MaskStatistics mask_statistics(const Mask& mask, const Problem& problem, int64_t tile_rows,
                               int64_t tile_columns) {
  check_host(problem);
  check_tile(tile_rows, tile_columns);
  const Program program = lower(mask, problem);
  const int64_t row_tiles = ceil_div(program.q_len, tile_rows);
  const int64_t column_tiles = ceil_div(program.kv_len, tile_columns);
  const int64_t places = int64_t{program.batches} * program.heads;
  std::atomic<int64_t> visible_pairs{0}, all_tiles{0}, some_tiles{0};
  // Tile by tile, so that words are only made where a tile is mixed.
  cpu::parallel_for(places * row_tiles, [&](int64_t task, int) {
    const Place place = place_of(program, task / row_tiles);
    const int64_t row_begin = task % row_tiles * tile_rows;
    Tile tile{static_cast<int>(row_begin),
              static_cast<int>(std::min<int64_t>(row_begin + tile_rows, program.q_len)), 0, 0};
    int64_t pairs = 0, all = 0, some = 0;
    for (int64_t begin = 0; begin < program.kv_len; begin += tile_columns) {
      tile.column_begin = static_cast<int>(begin);
      tile.column_end = static_cast<int>(std::min<int64_t>(begin + tile_columns, program.kv_len));
      const rules::TileClass found = cpu::exact_class(program, place, tile);
      if (found == rules::kAll) {
        ++all;
        pairs += int64_t{tile.row_end - tile.row_begin} * (tile.column_end - tile.column_begin);
      }
      if (found != rules::kSome) continue;
      ++some;
      for (int first = tile.row_begin / rules::kWordRows * rules::kWordRows; first < tile.row_end;
           first += rules::kWordRows) {
        const uint32_t rows = rules::run_word(tile.row_begin, tile.row_end, first);
        for (int column = tile.column_begin; column < tile.column_end; ++column) {
          pairs += std::popcount(column_word(program, place, column, first) & rows);
        }
      }
    }
    visible_pairs += pairs;
    all_tiles += all;
    some_tiles += some;
  });
  return {.pairs = places * program.q_len * program.kv_len,
          .visible_pairs = visible_pairs,
          .tiles = places * row_tiles * column_tiles,
          .all_tiles = all_tiles,
          .some_tiles = some_tiles};
}

void mask_to_dense(const Mask& mask, const Problem& problem, const Tensor& allowed) {
  check_host(problem);
  const Program program = lower(mask, problem);
  check_bytes("allowed", allowed, {program.batches, program.heads, program.q_len, program.kv_len});
  auto* bytes = static_cast<uint8_t*>(allowed.data);
  for_each_word(program, [&](int64_t place, int first, int column, uint32_t word) {
    uint8_t* target = bytes + place / program.heads * allowed.stride[0] +
                      place % program.heads * allowed.stride[1] + first * allowed.stride[2] +
                      column * allowed.stride[3];
    const int rows = std::min(rules::kWordRows, program.q_len - first);
    for (int r = 0; r < rows; ++r) target[r * allowed.stride[2]] = word >> r & 1u;
  });
}

void mask_tile_classes(const Mask& mask, const Problem& problem, int64_t tile_rows,
                       int64_t tile_columns, const Tensor& classes) {
  check_host(problem);
  check_tile(tile_rows, tile_columns);
  const Program program = lower(mask, problem);
  const int64_t row_tiles = ceil_div(program.q_len, tile_rows);
  const int64_t column_tiles = ceil_div(program.kv_len, tile_columns);
  check_bytes("classes", classes, {program.batches, program.heads, row_tiles, column_tiles});
  auto* bytes = static_cast<uint8_t*>(classes.data);
  const int64_t places = int64_t{program.batches} * program.heads;
  cpu::parallel_for(places * row_tiles, [&](int64_t task, int) {
    const Place place = place_of(program, task / row_tiles);
    const int64_t row_begin = task % row_tiles * tile_rows;
    for (int64_t c = 0; c < column_tiles; ++c) {
      const Tile tile{static_cast<int>(row_begin),
                      static_cast<int>(std::min<int64_t>(row_begin + tile_rows, program.q_len)),
                      static_cast<int>(c * tile_columns),
                      static_cast<int>(std::min<int64_t>((c + 1) * tile_columns, program.kv_len))};
      bytes[place.batch * classes.stride[0] + place.head * classes.stride[1] +
            task % row_tiles * classes.stride[2] + c * classes.stride[3]] =
          static_cast<uint8_t>(cpu::exact_class(program, place, tile));
    }
  });
}

}  // namespace anymask
