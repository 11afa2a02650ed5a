// Dynamic masks on the host: which row each key is last kept for.
#include "cpu/top_keys.h"

#include <algorithm>
#include <bit>
#include <queue>
#include <vector>

#include "cpu/threads.h"

namespace anymask::cpu {
namespace {

// Orders keys by score, then by index, in one integer: larger is better. Floats compare as their
// bits do once negative ones are flipped; NaN becomes the least.
uint64_t rank_of(float score, int64_t index) {
  const auto bits = std::bit_cast<uint32_t>(score == 0.0f ? 0.0f : score);
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  const uint32_t key = score != score ? 0u : ordered;
  return uint64_t{key} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

int64_t index_of(uint64_t rank) { return 0xffffffffu - static_cast<uint32_t>(rank); }

// Walks the keys from first to last with the `keep` best so far in a heap whose top is the worst:
// the key that falls out when key i comes in is hidden from row i on.
void select(const float* scores, int64_t stride, int64_t kv_len, int64_t keep, int64_t q_len,
            int32_t* ends) {
  std::fill_n(ends, kv_len, static_cast<int32_t>(q_len));
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> kept;
  for (int64_t i = 0; i < kv_len; ++i) {
    kept.push(rank_of(scores[i * stride], i));
    if (static_cast<int64_t>(kept.size()) <= keep) continue;
    ends[index_of(kept.top())] = static_cast<int32_t>(std::max<int64_t>(i - (kv_len - q_len), 0));
    kept.pop();
  }
}

}  // namespace

void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends) {
  const int64_t heads = scores.shape[1], kv_len = scores.shape[2];
  parallel_for(scores.shape[0] * heads, [&](int64_t place, int) {
    const auto* from = static_cast<const float*>(scores.data) + place / heads * scores.stride[0] +
                       place % heads * scores.stride[1];
    select(from, scores.stride[2], kv_len, keep, q_len,
           static_cast<int32_t*>(ends.data) + place * kv_len);
  });
}

}  // namespace anymask::cpu
