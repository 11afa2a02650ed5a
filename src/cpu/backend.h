// The CPU backend's door: calls that are already checked.
#pragma once

#include <string>
#include <vector>

#include "anymask/attention.hpp"
#include "plan/layout.h"
#include "rules/program.h"

namespace anymask::cpu {

// The tiles that the kernels work on for this problem.
plan::TileShapes tile_shapes(const Problem& problem);

struct ForwardCall {
  Tensor q, k, v, out, lse;       // as in anymask::ForwardArgs, validated; sizes may be 0
  const rules::Program* program;  // dense leaves packed
  plan::TileMap rows;             // row map in the forward tile shape
  double scale;
  ScoreOptions scores;
};

struct BackwardCall {
  Tensor q, k, v, out, lse, dout, dlse, dq, dk, dv;  // dlse may be "none"
  const rules::Program* program;
  plan::TileMap rows;     // row map in the backward tile shape
  plan::TileMap columns;  // column map in the backward tile shape
  double scale;
  ScoreOptions scores;
  Tensor dkey_bias, dbias, dsink;  // each may be "none"
};

// Both write every element of their outputs.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

std::vector<std::string> instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);  // throws InvalidValue
double measure_peak(DType dtype);

}  // namespace anymask::cpu
