// Which batch entry and head of a mask a query head belongs to.
#pragma once

#include "rules/common.h"
#include "rules/program.h"

namespace anymask::cuda {

// Params: of the forward or the backward pass. Most masks have one head, which saves two divisions.
template <typename Params>
__device__ __forceinline__ rules::Place mask_place(const Params& p, int batch, int head) {
  const int heads = p.program.heads;
  return {p.program.batches == 1 ? 0 : batch, heads == 1 ? 0 : head / (p.q_heads / heads)};
}

}  // namespace anymask::cuda
