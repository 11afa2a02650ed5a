// Recovers FlashMask's startend_row_indices from a dense mask.
#include <algorithm>
#include <string>
#include <vector>

#include "anymask/plan.hpp"
#include "mask/describe.h"

namespace anymask {
namespace {

// The runs of masked rows of one column, found row by row. Rows above the causal diagonal may count
// as masked or not, whatever makes fewer runs, so they are never shown to it.
struct ColumnRuns {
  int32_t count = 0;
  int32_t begin[2] = {0, 0};
  int32_t end[2] = {0, 0};
  bool open = false;  // the last row seen was masked

  void see(int32_t row, bool masked) {
    if (masked && !open) {
      if (count < 2) begin[count] = row;
      ++count;
    }
    if (masked && count <= 2) end[count - 1] = row + 1;
    open = masked;
  }
};

// How many columns of startend_row_indices this column needs; 0: it cannot be written so.
int columns_needed(const ColumnRuns& runs, int32_t q_len, bool causal) {
  const bool to_the_end = runs.count > 0 && runs.end[runs.count == 2] == q_len;
  if (causal)
    return runs.count == 0 || (runs.count == 1 && to_the_end) ? 1 : runs.count == 1 ? 2 : 0;
  if (runs.count == 0) return 2;
  const bool from_start = runs.begin[0] == 0;
  if (runs.count == 1) return from_start || to_the_end ? 2 : 4;
  if (runs.count == 2) return from_start && to_the_end ? 2 : 4;
  return 0;
}

void write_column(const ColumnRuns& runs, int n, int32_t q_len, bool causal, int32_t* target) {
  const bool to_the_end = runs.count > 0 && runs.end[runs.count == 2] == q_len;
  const int last = std::max(runs.count - 1, 0);
  if (n == 1) {
    target[0] = runs.count > 0 ? runs.begin[0] : q_len;
  } else if (n == 2 && causal) {
    target[0] = runs.count > 0 ? runs.begin[0] : q_len;
    target[1] = runs.count > 0 ? runs.end[0] : q_len;
  } else if (n == 2) {
    target[0] = to_the_end ? runs.begin[last] : q_len;
    target[1] =
        runs.count > 0 && runs.begin[0] == 0 && !(runs.count == 1 && to_the_end) ? runs.end[0] : 0;
  } else {
    target[0] = runs.count > 0 ? runs.begin[last] : q_len;
    target[1] = runs.count > 0 ? runs.end[last] : q_len;
    target[2] = runs.count > 1 ? runs.begin[0] : 0;
    target[3] = runs.count > 1 ? runs.end[0] : 0;
  }
}

}  // namespace

int intervals_from_dense(const Tensor& allowed, bool causal, const Tensor& indices) {
  if (allowed.dtype != DType::u8) fail_dtype("allowed", allowed.dtype, "bool or uint8");
  if (allowed.ndim != 4) fail_shape("allowed", allowed, "[batch, heads, q_len, kv_len]");
  if (indices.dtype != DType::i32) fail_dtype("indices", indices.dtype, "int32");
  const int64_t batches = allowed.shape[0], heads = allowed.shape[1], kv_len = allowed.shape[3];
  const auto q_len = static_cast<int32_t>(allowed.shape[2]);
  const int64_t wanted[4] = {batches, heads, kv_len, 4};
  if (indices.ndim != 4 || !std::equal(wanted, wanted + 4, indices.shape)) {
    fail_shape("indices", indices, shape_text({batches, heads, kv_len, 4}));
  }
  const int64_t offset = kv_len - q_len;
  std::vector<ColumnRuns> runs(static_cast<size_t>(batches * heads * kv_len));
  for (int64_t place = 0; place < batches * heads; ++place) {
    const auto* bytes = static_cast<const uint8_t*>(allowed.data) +
                        place / heads * allowed.stride[0] + place % heads * allowed.stride[1];
    ColumnRuns* columns = runs.data() + place * kv_len;
    for (int32_t row = 0; row < q_len; ++row) {
      const int64_t seen = causal ? std::clamp<int64_t>(row + offset + 1, 0, kv_len) : kv_len;
      for (int64_t c = 0; c < seen; ++c) {
        columns[c].see(row, bytes[row * allowed.stride[2] + c * allowed.stride[3]] == 0);
      }
    }
  }
  int n = causal ? 1 : 2;
  for (int64_t i = 0; i < batches * heads * kv_len; ++i) {
    const int needed = columns_needed(runs[static_cast<size_t>(i)], q_len, causal);
    if (needed == 0) {
      throw InvalidValue(
          "allowed cannot be written as intervals: key column " + std::to_string(i % kv_len) +
          " of batch " + std::to_string(i / kv_len / heads) + ", head " +
          std::to_string(i / kv_len % heads) + " has " +
          std::to_string(runs[static_cast<size_t>(i)].count) + " runs of masked rows; at most " +
          (causal ? "1 fits under the causal triangle" : "2 fit"));
    }
    n = std::max(n, needed);
  }
  for (int64_t i = 0; i < batches * heads * kv_len; ++i) {
    write_column(runs[static_cast<size_t>(i)], n, q_len, causal,
                 static_cast<int32_t*>(indices.data) + i * 4);
  }
  return n;
}

}  // namespace anymask
