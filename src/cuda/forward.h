// The Hopper forward pass, host side: which kernel variant serves a call, and its launch.
#pragma once

#include <vector>

#include "anymask/attention.hpp"
#include "cuda/kernel.h"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cuda {

// Whether there are so few rows that smaller row tiles, which more multiprocessors can share, make
// the call faster.
bool has_few_rows(const Problem& problem);

// The tile of the forward row map that the kernel for this problem walks: the plan is built for it.
// Head dimensions: multiples of 8 up to 256.
plan::TileShape forward_tile_shape(const Problem& problem);

struct ForwardCall {
  Tensor q, k, v, out;  // [batch, length, heads, depth], f16 or bf16, any sizes; validated
  Tensor lse;           // [batch, q_heads, q_len] f32, contiguous; or "none"
  const rules::Program*
      program;         // dense leaves packed; with a key order, k and v are in that order
  plan::TileMap rows;  // row map in forward_tile_shape
  double scale;
  const ScoreOptions* scores;
  void* workspace;  // forward_workspace_bytes, nobody else's until the work is done
};

// `program`: the lowered mask.
int64_t forward_workspace_bytes(const Problem& problem, const rules::Program& program);

// Queues the pass on `stream`; writes every element of out and lse. Never waits for the device; can
// be captured in a graph.
void forward(const ForwardCall& call, int ordinal, CuStream stream);

// The variants that a release ships compiled.
std::vector<KernelConfig> forward_kernels();

}  // namespace anymask::cuda
