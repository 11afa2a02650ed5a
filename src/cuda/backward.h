// The Hopper backward pass, host side: which kernel variants serve a call, and their launches.
#pragma once

#include <vector>

#include "anymask/types.hpp"
#include "cuda/kernel.h"
#include "cuda/score_gradients.h"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// The tile of the backward maps that the kernel for these head dimensions walks: the plan is built
// for it. Dimensions: multiples of 8 up to 256.
plan::TileShape backward_tile_shape(int64_t head_dim, int64_t v_head_dim);

// Scratch memory of a pass: 4 bytes for every element of q (its depth padded to 64, 128 or 256) and
// some for every row, and where items are divided 8 bytes for every element of k; for
// gradients of score options a number a key and query head, or one for every element of a 16-bit
// bias of pairs that batch entries or heads share.
int64_t backward_workspace(const Problem& problem, bool deterministic, const ScoreCall& scores);

struct BackwardCall {
  Tensor q, k, v, out, dout;  // [batch, length, heads, depth], f16 or bf16, any sizes; validated
  Tensor lse, dlse;           // [batch, q_heads, q_len] f32, contiguous; dlse may be "none"
  Tensor dq, dk, dv;
  const rules::Program* program;  // dense leaves packed; with a key order, k and v are in that
                                  // order, and dk and dv come back in the caller's
  plan::TileMap rows;             // row map in backward_tile_shape; read if deterministic
  plan::TileMap columns;          // column map in backward_tile_shape
  double scale;
  const ScoreOptions* scores;
  Tensor dkey_bias, dbias, dsink;  // "none" where not wanted
  bool deterministic;
  void* workspace;  // backward_workspace bytes, nobody else's until the work is done
};

// Queues the pass on `stream`; writes every element of dq, dk, dv and the gradients of options.
// Never waits for the device; can be captured in a graph. Views that the copy engine cannot read
// (see layout_problem) throw.
void backward(const BackwardCall& call, int ordinal, CuStream stream);

// The variants that a release ships compiled.
std::vector<KernelConfig> backward_kernels();

}  // namespace anymask::cuda
