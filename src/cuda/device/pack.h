// Packs a dense mask into words of 32 rows: one pass over its elements.
#pragma once

#include "cuda/device/plan_params.h"

namespace anymask::cuda {

template <int kBytes>
struct Element;
template <>
struct Element<1> {
  using Type = uint8_t;
};
template <>
struct Element<2> {
  using Type = uint16_t;
};
template <>
struct Element<4> {
  using Type = uint32_t;
};
template <>
struct Element<8> {
  using Type = uint64_t;
};

// 32 rows of one column. Loads of neighbouring lanes are neighbours when columns are contiguous;
// when rows are, a thread reads whole sectors by itself.
template <typename T>
inline uint32_t pack_column(const T* first, int64_t row_stride, int rows, int sign_bits) {
  uint32_t word = 0;
  for (int r = 0; r < 32; ++r) {
    const T element = r < rows ? first[r * row_stride] : T{0};
    word |= static_cast<uint32_t>(static_cast<T>(element << sign_bits) != 0) << r;
  }
  return word;
}

// 32 rows of four columns of bytes. A byte that is not 0 sets its top bit; shifting right once a
// row collects eight rows in each byte, and the four bytes of a column then sit in four registers.
inline void pack_quad(const uint8_t* first, int64_t row_stride, int rows, uint32_t* words) {
  uint32_t eights[4];
  for (int part = 0; part < 4; ++part) {
    uint32_t collected = 0;
    for (int r = 8 * part; r < 8 * part + 8; ++r) {
      const uint32_t four =
          r < rows ? *reinterpret_cast<const uint32_t*>(first + r * row_stride) : 0u;
      const uint32_t nonzero = (((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u;
      collected = ((collected >> 1) & 0x7f7f7f7fu) | nonzero;
    }
    eights[part] = collected;
  }
  for (int column = 0; column < 4; ++column) {
    const uint32_t low = __byte_perm(eights[0], eights[1], column | (column + 4) << 4);
    const uint32_t high = __byte_perm(eights[2], eights[3], column | (column + 4) << 4);
    words[column] = __byte_perm(low, high, 0x5410);
  }
}

template <PackConfig kConfig>
inline void pack(const PackParams& params) {
  using T = typename Element<kConfig.bytes>::Type;
  const int column_block = static_cast<int>(blockIdx.x % params.column_blocks);
  const int rest = static_cast<int>(blockIdx.x / params.column_blocks);
  const int word_row = rest % params.word_rows;
  const int place = rest / params.word_rows;
  const int64_t batch = place / params.heads;
  const int64_t head = place % params.heads;

  const rules::Array& dense = params.dense;
  const int first_row = word_row * rules::kWordRows;
  const int rows = rules::min_of(rules::kWordRows, params.rows - first_row);
  const T* from = static_cast<const T*>(dense.data) + batch * dense.batch_stride +
                  head * dense.head_stride + first_row * dense.row_stride;
  const rules::Array& words = params.words;
  uint32_t* to = static_cast<uint32_t*>(const_cast<void*>(words.data)) +
                 batch * words.batch_stride + head * words.head_stride +
                 word_row * words.row_stride;

  const int first =
      (column_block * kPackThreads + static_cast<int>(threadIdx.x)) * (kConfig.quads ? 4 : 1);
  if (kConfig.quads && first + 4 <= params.columns) {
    uint32_t packed[4];
    pack_quad(reinterpret_cast<const uint8_t*>(from + first), dense.row_stride, rows, packed);
    *reinterpret_cast<uint4*>(to + first) = {packed[0], packed[1], packed[2], packed[3]};
    return;
  }
  const int end = rules::min_of(first + (kConfig.quads ? 4 : 1), params.columns);
  for (int column = first; column < end; ++column) {
    const uint32_t word =
        pack_column(from + column * dense.column_stride, dense.row_stride, rows, params.sign_bits);
    to[column] = dense.row_stride == 0 ? 0u - word : word;  // one row stands for all 32
  }
}

}  // namespace anymask::cuda
