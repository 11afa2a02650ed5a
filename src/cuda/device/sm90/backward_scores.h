// Score options in the Hopper backward kernels: what math threads do to scores and their gradients
// beside scale and mask. The forward pass has the same in forward_math.h; here rows are keys and
// columns are queries (backward_elements.h says which values a thread holds).
//
// A softcap's derivative and (with dropout) P are needed twice, on both sides of the product that
// makes dP. Where no registers are left for them they wait in shared memory, 16 words a thread.
#pragma once

#include "cuda/device/scores.h"
#include "cuda/device/sm90/backward_bias_tiles.h"
#include "cuda/device/sm90/backward_elements.h"
#include "cuda/device/sm90/backward_pairs.h"
#include "cuda/device/sm90/backward_schedule.h"

namespace anymask::cuda {

// What is put aside for a thread's piece, packed: in registers, or at a place of its own in shared
// memory, where a warp's lanes lie side by side.
//
// kAtOnce words of it come and go at once; what else is in registers then decides how many there
// may be.
template <BackwardConfig C>
struct PutAside {
  static constexpr bool kInRegisters = C.puts_aside_in_registers();
  static constexpr int kWords = kPieceValues / 2;
  static constexpr int kAtOnce = C.has(kBias) && !C.has(kBiasTiles) && C.has(kDropout) ? 2 : 4;
  struct alignas(4 * kAtOnce) Words {
    uint32_t word[kAtOnce];
  };
  uint32_t words[kInRegisters ? kWords : 1];
  Words* memory;

  // This lane's in a place of 2 KiB, 128-byte aligned, that its warp has.
  __device__ __forceinline__ void lie_at(void* place, int lane) {
    memory = static_cast<Words*>(place) + lane;
  }

  // Words kAtOnce * `index` and on, of the values from twice that on.
  __device__ __forceinline__ void put(int index, const Words& some) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) words[kAtOnce * index + i] = some.word[i];
    } else {
      memory[32 * index] = some;
    }
  }
  __device__ __forceinline__ void get(int index, Words& some) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) some.word[i] = words[kAtOnce * index + i];
    } else {
      some = memory[32 * index];
    }
  }
};

template <BackwardConfig C>
struct ScoreOptionsOfThread {
  using Shared = BackwardShared<C>;
  static constexpr bool kHalf = C.half != 0;
  using Words = typename PutAside<C>::Words;
  static constexpr int kWordsAtOnce = PutAside<C>::kAtOnce;
  static constexpr int kAtOnce = 2 * kWordsAtOnce;  // values

  const BackwardParams& p;
  Shared& shared;
  const int key;  // in the tile, of this thread's first; the other is 8 further
  const int lane;
  PutAside<C> slopes;   // 1 - tanh^2
  PutAside<C> weights;  // P, nothing dropped

  // Where a head begins: its biases (kWeighs), and its sums of logits' gradients (kSums). Both are
  // in shared memory, since registers are few; a warp reads only what it wrote.
  template <bool kWeighs, bool kSums>
  __device__ __forceinline__ void begin_step(int stage) {
    if constexpr (C.has(kKeyBias)) {
      const StepPlace& place = shared.step_places[stage];
      const int begins = ptx::uniform(place.begins);
      if (begins == 0) return;
      if (kSums && begins == StepPlace::kNextHead) end_head();
      ThreadKeys<C> keys;
      keys.find(p, place, key);
      if (const int r = lane % 4; r < 2) {
        const bool exists = keys.exists(p, r);
        if constexpr (kWeighs) shared.key_bias[key + 8 * r] = key_bias(place, keys, r, exists);
        if constexpr (kSums) {
          const int64_t head = static_cast<int64_t>(place.batch) * p.q_heads + place.head;
          shared.key_sum_places[key + 8 * r] = exists && p.key_sums != nullptr
                                                   ? p.key_sums + (head * p.kv_len + keys.at(r))
                                                   : nullptr;
        }
      }
      if constexpr (kSums) shared.key_sums[sums_index()] = {0.0f, 0.0f};
      __syncwarp();
    }
  }

  // At the end of an item too. All steps of a head in an item come in a row.
  __device__ __forceinline__ void end_head() {
    if constexpr (C.has(kKeyBias)) {
      float2 sums = shared.key_sums[sums_index()];
#pragma unroll
      for (int step = 1; step <= 2; ++step) {
        sums.x += ptx::shuffle_xor(sums.x, step);
        sums.y += ptx::shuffle_xor(sums.y, step);
      }
      if (const int r = lane % 4; r < 2) {
        float* const to = shared.key_sum_places[key + 8 * r];
        const float sum = r == 0 ? sums.x : sums.y;
        if (to != nullptr && C.adds_keys != 0) {
          atomicAdd(to, sum);  // segments of rows have one each
        } else if (to != nullptr) {
          *to = sum;
        }
      }
      __syncwarp();
    }
  }

  // A row's number for each column of the piece: [4 k] has those of queries 8k + 2q and 8k + 2q
  // + 1.
  __device__ __forceinline__ const float2* row_numbers(int stage, int which) const {
    return reinterpret_cast<const float2*>(shared.row_numbers[stage] + which * kBackwardRows) +
           lane % 4;
  }

  // S to P, but for the mask.
  __device__ __forceinline__ void weigh(float (&values)[kPieceValues], int stage) {
    if constexpr (C.features == kSoftcap) {  // with others there are too few registers
      if (all_near(p.scores.cap, values)) return weigh_near(values, stage);
    }
    if constexpr (C.has(kSoftcap)) {
      cap_scores(p.scores.cap, values);
      put_slopes([&](int at) { return __fmaf_rn(-values[at], values[at], 1.0f); });
    }
    const float2* const lse = row_numbers(stage, kLseOfRow);
    [[maybe_unused]] PairTile<C> pairs;
    [[maybe_unused]] const BiasPiece<C> piece{p, shared, stage, key, lane};
    [[maybe_unused]] float floor[2];
    if constexpr (C.has(kBiasTiles)) {
      piece.find_floor(floor);
    } else if constexpr (C.has(kBias)) {
      pairs.find(p, shared, stage, key, lane);
    }
    constexpr int kBlocks = C.has(kBiasTiles) ? 2 : 1;  // more takes registers that are not there
#pragma unroll
    for (int k = 0; k < kPieceValues / 4; k += kBlocks) {
      float added[4 * kBlocks];  // to the product, as exp2 takes it
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        added[i] = C.has(kKeyBias) ? shared.key_bias[key + 8 * (i / 2 % 2)] : 0.0f;
      }
      if constexpr (C.has(kBiasTiles)) {
        piece.add(k, floor, added);
      } else if constexpr (C.has(kBias)) {
        pairs.add_biases(p, k, added);
      }
      if constexpr (C.has(kSoftcap)) {
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) {
          const float2 both = lse[4 * (k + i / 4)];
          added[i] -= i % 2 == 0 ? both.x : both.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        float& value = values[4 * k + i];
        value = ptx::exp2_fast(__fmaf_rn(value, p.scale_log2, added[i]));
      }
    }
  }

  // The same of scores near 0 under a cap.
  __device__ __forceinline__ void weigh_near(float (&values)[kPieceValues], int stage) {
    float2 lse[kPieceValues / 4];  // read ahead of what is put aside, which might lie there too
#pragma unroll
    for (int k = 0; k < kPieceValues / 4; ++k) lse[k] = row_numbers(stage, kLseOfRow)[4 * k];
    put_slopes([&](int at) {
      const float2 both = lse[at / 4];
      const NearScore score = near_score(p.scores.cap, values[at], at % 2 == 0 ? -both.x : -both.y);
      values[at] = ptx::exp2_fast(score.exponent);
      return score.slope;
    });
  }

  // slope_at(i): 1 - tanh^2 of value i.
  template <typename SlopeAt>
  __device__ __forceinline__ void put_slopes(const SlopeAt& slope_at) {
#pragma unroll
    for (int index = 0; index < kPieceValues / kAtOnce; ++index) {
      Words some;
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        const int at = kAtOnce * index + 2 * i;
        const float low = slope_at(at), high = slope_at(at + 1);
        some.word[i] = pack_pair<kHalf>(low, high);
      }
      slopes.put(index, some);
    }
  }

  // Puts P aside, and drops pairs from `values`: dV's operand.
  __device__ __forceinline__ void drop(float (&values)[kPieceValues], int slot) {
    if constexpr (C.has(kDropout)) {
      uint32_t kept[2][2];
      read_words(shared.kept[slot], key, lane % 4, kept);
#pragma unroll
      for (int index = 0; index < kPieceValues / kAtOnce; ++index) {
        Words some;
#pragma unroll
        for (int i = 0; i < kWordsAtOnce; ++i) {
          const int at = kAtOnce * index + 2 * i;
          some.word[i] = pack_pair<kHalf>(values[at], values[at + 1]);
        }
        weights.put(index, some);
      }
      hide(values, kept);
    }
  }

  // dP to dS, packed as an A operand. `grads`: dP less the rows' sums; with dropout just dP.
  // `packed`: dV's operand, which is P unless pairs are dropped. `slot`: of the kept pairs.
  __device__ __forceinline__ void differentiate(const float (&grads)[kPieceValues],
                                                const uint32_t (&packed)[kPieceValues / 2],
                                                int stage, int slot,
                                                uint32_t (&to)[kPieceValues / 2]) {
    uint32_t kept[2][2];
    if constexpr (C.has(kDropout)) read_words(shared.kept[slot], key, lane % 4, kept);
    const float2* const sums = row_numbers(stage, kSumOfRow);
    float2 of_keys{};
    if constexpr (C.has(kKeyBias)) of_keys = shared.key_sums[sums_index()];
    [[maybe_unused]] PairTile<C> pairs;
    [[maybe_unused]] const BiasPiece<C> piece{p, shared, stage, key, lane};
    if constexpr (C.has(kBias) && !C.has(kBiasTiles)) pairs.find(p, shared, stage, key, lane);
#pragma unroll
    for (int index = 0; index < kPieceValues / kAtOnce; ++index) {
      Words weight, slope;
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) weight.word[i] = packed[kWordsAtOnce * index + i];
      if constexpr (C.has(kDropout)) weights.get(index, weight);
      if constexpr (C.has(kSoftcap)) slopes.get(index, slope);
      float logits[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = kAtOnce * index + i, k = at / 4, r = at / 2 % 2;
        float grad = grads[at];
        if constexpr (C.has(kDropout)) {
          const bool keeps = (kept[r][k / 4] >> (8 * (k % 4) + at % 2)) & 1;
          const float2 both = sums[4 * k];
          grad =
              __fmaf_rn(keeps ? grad : 0.0f, p.scores.keep_scale, at % 2 == 0 ? -both.x : -both.y);
        }
        logits[i] = half_of(weight.word[i / 2], i) * grad;
        if constexpr (C.has(kKeyBias)) (r == 0 ? of_keys.x : of_keys.y) += logits[i];
      }
      if constexpr (C.has(kBiasTiles)) {
        piece.give(kAtOnce / 4 * index, logits);
      } else if constexpr (C.has(kBias)) {
#pragma unroll
        for (int i = 0; i < kAtOnce; i += 4) {
          pairs.give_gradients(p, (kAtOnce * index + i) / 4, &logits[i]);
        }
      }
      if constexpr (C.has(kSoftcap)) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) logits[i] *= half_of(slope.word[i / 2], i);
      }
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        to[kWordsAtOnce * index + i] = pack_pair<kHalf>(logits[2 * i], logits[2 * i + 1]);
      }
    }
    if constexpr (C.has(kKeyBias)) shared.key_sums[sums_index()] = of_keys;
    if constexpr (C.has(kBiasTiles)) piece.finish();
  }

  // Before the step's Q is given back, and what lies beside it.
  __device__ __forceinline__ void end_step() const {
    if constexpr (C.has(kBiasTiles)) BiasPiece<C>::wait_for_copy(lane);
  }

 private:
  // Keys that do not exist see to it that their weights are 0, however small lse is.
  __device__ __forceinline__ float key_bias(const StepPlace& place, const ThreadKeys<C>& keys,
                                            int r, bool exists) const {
    constexpr float kLog2E = 1.4426950408889634f;
    if (!exists) return kMinusInfinity;
    float sum = 0.0f;
    if (const Numbers& numbers = p.scores.key_bias; numbers.data != nullptr) {
      sum = number_at<kHalf>(numbers, numbers_of(numbers, place.batch, place.head, 0),
                             keys.at(r) * numbers.key_stride);
    }
    if (const Numbers& numbers = p.column_bias; numbers.data != nullptr) {
      sum += number_at<kHalf>(numbers, numbers_of(numbers, place.batch, place.head, 0),
                              keys.at(r) * numbers.key_stride);
    }
    return sum * kLog2E;
  }

  __device__ __forceinline__ int sums_index() const { return key / 16 * 32 + lane; }

  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return i % 2 == 0 ? ptx::low_of<kHalf>(pair) : ptx::high_of<kHalf>(pair);
  }
};

}  // namespace anymask::cuda
