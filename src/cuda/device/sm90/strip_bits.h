// The bits of a tile as a math warp takes them from their ring.
#pragma once

#include "cuda/device/ptx/registers.h"
#include "cuda/device/sm90/forward_shared.h"

namespace anymask::cuda {

// What the mask leaves of one tile for this warpgroup's strip and this thread's two rows.
template <ForwardConfig C>
struct StripMask {
  int first_block;  // the blocks that the strip sees anything in lie between these,
  int blocks;       // none where blocks is 0
  bool hidden;      // and something among them is hidden
  uint32_t words[2][C.word_groups()];
  uint32_t kept[2][C.word_groups()];  // of dropout
  int first_key;                      // position of the tile's first key; with biases of pairs
  bool taken;                         // it has a slot of bits
};

template <ForwardConfig C>
struct StripBits {
  ForwardShared<C>& shared;
  const int w;     // warpgroup
  const int warp;  // in the warpgroup
  const int lane;
  Ring<C.bit_slots> ring;

  // The words of this thread's two rows.
  __device__ __forceinline__ void read_words(const uint32_t (&bits)[C.word_groups()][64][4],
                                             uint32_t (&words)[2][C.word_groups()]) {
    const int row = 16 * warp + lane / 4;
#pragma unroll
    for (int g = 0; g < C.word_groups(); ++g) {
      words[0][g] = bits[g][row][lane % 4];
      words[1][g] = bits[g][row + 8][lane % 4];
    }
  }

  // The bits of the strip's first block come first: 16 of a word are one block.
  __device__ __forceinline__ void skip_blocks(int blocks, uint32_t (&words)[2][C.word_groups()]) {
    constexpr int kLast = C.word_groups() - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (blocks >= 2) words[r][0] = words[r][kLast];
      if ((blocks & 1) != 0) words[r][0] = __funnelshift_r(words[r][0], words[r][kLast], 16);
    }
  }

  __device__ __forceinline__ void give_back() {
    shared.bits_empty[ring.slot].arrive_warp(lane);
    ring.next();
  }

  // Where there is a slot for every tile it is given back once its last part has been read; else
  // it has been as soon as the words were.
  __device__ __forceinline__ void release() {
    if constexpr (C.every_tile()) give_back();
  }

  // But the copy engine does not queue behind loads of the words, as other warps' stores do: its
  // slots are given back when something has come of what was read. (With biases of pairs on their
  // way from memory, such loads were overtaken once in a hundred calls. Overlapped tiles under
  // kBounded wait for nothing, but they have no biases for loads to queue behind either.)
  static constexpr bool kCopied = C.baked() && !C.every_tile();
  __device__ __forceinline__ void release_copied(const StripMask<C>& mask) {
    if constexpr (kCopied) {
      if (mask.taken) give_back();
    }
  }

  // live: the strip has rows.
  __device__ __forceinline__ StripMask<C> take(bool live, bool partial) {
    StripMask<C> mask{0, live ? C.blocks() : 0, false, {}, {}, 0, false};
    if (!C.every_tile() && !partial) return mask;
    shared.bits_full[ring.slot].wait(ring.parity);
    if constexpr (C.has(kDropout)) {
      read_words(shared.kept[ring.slot][w], mask.kept);
    }
    if (C.every_tile() && !partial) return mask;
    uint32_t visible = 0, hidden = 0;  // a bit per 64 columns
    read_words(shared.bits[ring.slot].words[w], mask.words);
#pragma unroll
    for (int g = 0; g < C.word_groups(); ++g) {
      uint32_t classes = shared.bits[ring.slot].classes[w][g];
      classes |= classes >> 16;
      classes |= classes >> 8;
      visible |= (classes & 3) << (2 * g);
      hidden |= ((classes >> 2) & 3) << (2 * g);
    }
    mask.taken = true;
    if constexpr (!C.every_tile() && !kCopied) give_back();
    visible = ptx::uniform(visible);
    hidden = ptx::uniform(hidden);
    if (visible == 0 || !live) {
      mask.blocks = 0;
    } else if constexpr (C.blocks() == 1) {
      mask.hidden = hidden != 0;
    } else {
      mask.first_block = __ffs(visible) - 1;
      mask.blocks = 32 - __clz(visible) - mask.first_block;
      mask.hidden = ((hidden >> mask.first_block) & ((1u << mask.blocks) - 1)) != 0;
      skip_blocks(mask.first_block, mask.words);
      if constexpr (C.has(kDropout)) skip_blocks(mask.first_block, mask.kept);
    }
    return mask;
  }
};

}  // namespace anymask::cuda
