// The pairs that dropout keeps, as words of 32 query rows of a key: made by the warps that make
// mask bits, for every tile.
//
// Dropout's pattern comes as 64 keys of a row, in two words. So a lane takes a row, and 32 rows of
// 32 keys are then transposed across the warp.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/backward_schedule.h"
#include "cuda/device/transpose_bits.h"

namespace anymask::cuda {

template <BackwardConfig C>
struct KeptPairs {
  using Shared = BackwardShared<C>;
  // Both runs of 32 rows at once: half of the waiting, and twice the registers.
  static constexpr bool kPaired = C.load_registers >= 40;

  rules::Dropout dropout;
  const int32_t* order;  // the caller's keys at positions, or null
  int pair = -1;         // whose these are
  // The first part of the next request that is this warp's. There are hardly ever as many parts for
  // each warp, so it is another one each time that has more to do.
  int turn;

  __device__ __forceinline__ explicit KeptPairs(int index) : turn(index) {}

  // This warp's share of what the request in a slot is about. The whole warp, converged.
  __device__ __forceinline__ void make(const BackwardParams& p, Shared& shared, int slot,
                                       int lane) {
    // All of it in uniform registers, and with it blocks and the keys of rounds: others are few.
    const KeptRequest& request = shared.kept_requests[slot];
    const int batch = ptx::uniform(request.batch), head = ptx::uniform(request.head);
    if (const int wanted = batch * p.q_heads + head; wanted != pair) {
      pair = wanted;
      dropout = dropout_of(p.scores, batch, head);
      order = key_order(p, {0, batch, head / p.group_heads, 0, 0});
    }
    const int first_row = ptx::uniform(shared.requests[slot].row_tile) * kBackwardRows + lane;
    const int first_key = ptx::uniform(shared.requests[slot].key_tile) * C.columns();
    auto& kept = shared.kept[slot];
    int part = turn;
    turn = turn == 0 ? Shared::kKeyBitWarps - 1 : turn - 1;
    if (order != nullptr) {  // 32 rows of 32 keys at a time
#pragma unroll 1
      for (; part < C.columns() / 16; part += Shared::kKeyBitWarps) {
        const int half = part % 2, key = part / 2 * 32;
        kept[key + lane][half] =
            transpose_bits(word_in_order(first_row + 32 * half, first_key + key, p.kv_len), lane);
      }
      return;
    }
    // 64 keys of 64 or 32 rows.
#pragma unroll 1
    for (; part < C.columns() / (kPaired ? 64 : 32); part += Shared::kKeyBitWarps) {
      const int key = (kPaired ? part : part / 2) * rules::kDropoutKeys, half = part % 2;
      const uint32_t row = first_row, block = (first_key + key) / rules::kDropoutKeys;
      if constexpr (kPaired) {
        const rules::KeptKeys<PairedWords> keys =
            rules::kept_keys<PairedWords>(dropout, WordPair{row, row + 32}, block);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          uint32_t(&to)[2] = kept[key + rules::key_of_bit(word, lane)];
          to[0] = transpose_bits(keys.word[word].a, lane);
          to[1] = transpose_bits(keys.word[word].b, lane);
        }
      } else {
        const rules::KeptKeys<LaneWords> keys =
            rules::kept_keys<LaneWords>(dropout, row + 32 * half, block);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          kept[key + rules::key_of_bit(word, lane)][half] = transpose_bits(keys.word[word], lane);
        }
      }
    }
  }

 private:
  // Which of the keys at positions first .. first + 31 `row` keeps.
  __device__ __forceinline__ uint32_t word_in_order(int row, int first, int kv_len) const {
    uint32_t word = 0;
    KeptInOrder kept;
    const int count = rules::min_of(32, kv_len - first);
#pragma unroll 1
    for (int i = 0; i < count; ++i) word |= kept.bit(dropout, row, order[first + i]) << i;
    return word;
  }
};

}  // namespace anymask::cuda
