// How the key tiles of few row tiles are shared out among more blocks: row tiles lie in a line,
// each as long as the key tiles that it sees and a bit, and the line is cut every so many units.
// Block b has what lies between cut b and cut b + 1: parts of row tiles (PartList in
// sm90/schedule.h), which are joined again (sm90/forward_parts.h). Host and device.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

// Row tiles that a call may have which is cut: one for each multiprocessor. Single strips of rows
// (ForwardConfig::halves) may be more, since left whole they come one after the other: 160 of 4096
// keys took as long as 264.
inline constexpr int kMostCutRowTiles = 132;
inline constexpr int kMostCutStrips = 4 * kMostCutRowTiles;

// In key tiles: what a part costs that has none, and the least that is worth a part. Cuts that are
// nearer to an end of a row tile than that move there.
inline constexpr int kPartOverhead = 1;
inline constexpr int kLeastPart = 2;
// And what it costs a call to join parts: 8 heads of 2048 rows, causal, where the longest row tile
// has 7 more than a share, took as long either way.
inline constexpr int kJoinCost = 7;

// Where one row tile is cut. Its parts are with blocks of ascending number.
struct RowCuts {
  int first_block;  // that has its first part
  int first_cut;    // the first one inside it
  int parts;

  // The key tile, among those that it sees, at which a part begins.
  ANYMASK_RULE constexpr int begin_of(int part, int start, int share) const {
    return part == 0 ? 0 : (first_cut + part - 1) * share - start;
  }
};

// Of a row tile that begins at `start` of the line and sees `count` key tiles.
ANYMASK_RULE constexpr RowCuts cuts_of(int start, int count, int share, int blocks) {
  const int first = (start + kLeastPart + share - 1) / share;
  const int end = start + count - kLeastPart;
  const int last = end < 0 ? -1 : end / share;
  return {rules::min_of(first, blocks) - 1, first, rules::max_of(last - first + 1, 0) + 1};
}

// How far cuts are apart; 0: nothing is cut, and row tile i is with block i. `units`: the length of
// the line; `longest`: that of a row tile.
ANYMASK_RULE constexpr int share_of(int units, int longest, int row_tiles, int blocks) {
  constexpr int kLeastShare = 4;
  const int share = rules::max_of((units + blocks - 1) / blocks, kLeastShare);
  return row_tiles <= blocks && longest <= share + kJoinCost ? 0 : share;
}

}  // namespace anymask::cuda
