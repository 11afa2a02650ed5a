#include "cuda/move_keys.h"

#include <algorithm>
#include <limits>

#include "anymask/error.hpp"
#include "cuda/device/move_keys_params.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kMoveKeys{"move_keys",
                                 "cuda/device/move_keys.h",
                                 nullptr,
                                 "anymask::cuda::MoveKeysParams",
                                 "anymask::cuda::move_keys",
                                 0,
                                 false,
                                 static_cast<int>(sizeof(MoveKeysParams))};

KernelConfig config() {
  KernelConfig result;
  result.family = &kMoveKeys;
  result.threads = kMoveThreads;
  return result;
}

}  // namespace

void move_keys(MoveKeys direction, const Tensor& call, const Tensor& ordered,
               const rules::Program& program, int ordinal, CuStream stream) {
  MoveKeysParams params{};
  params.plan = ordered.data;
  params.call = call.data;
  params.order = program.key_order;
  std::copy_n(ordered.stride, 3, params.plan_stride);
  std::copy_n(call.stride, 3, params.call_stride);
  params.row_pieces = static_cast<int32_t>(call.shape[3] / 8);
  params.length = static_cast<int32_t>(call.shape[1]);
  params.heads = static_cast<int32_t>(call.shape[2]);
  params.order_batches = program.batches;
  params.orders = program.heads / program.order_divisor;
  params.order_heads = params.heads / params.orders;
  params.to_plan = direction == MoveKeys::gather ? 1 : 0;
  params.pieces = call.shape[0] * call.shape[1] * call.shape[2] * params.row_pieces;
  const int64_t blocks = (params.pieces + kMoveThreads - 1) / kMoveThreads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("attention: too many keys to reorder in one call: split the batch");
  }
  launch(kernel(config(), ordinal), {static_cast<uint32_t>(blocks)}, stream, params);
}

std::vector<KernelConfig> move_keys_kernels() { return {config()}; }

}  // namespace anymask::cuda
