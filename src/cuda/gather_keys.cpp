#include "cuda/gather_keys.h"

#include <algorithm>
#include <limits>

#include "anymask/error.hpp"
#include "cuda/device/gather_keys_params.h"

namespace anymask::cuda {
namespace {

constexpr KernelFamily kGatherKeys{"gather_keys",
                                   "cuda/device/gather_keys.h",
                                   nullptr,
                                   "anymask::cuda::GatherKeysParams",
                                   "anymask::cuda::gather_keys",
                                   0,
                                   false,
                                   static_cast<int>(sizeof(GatherKeysParams))};

KernelConfig config() {
  KernelConfig result;
  result.family = &kGatherKeys;
  result.threads = kGatherThreads;
  return result;
}

}  // namespace

void gather_keys(const Tensor& from, const Tensor& to, const plan::Plan& plan, CuStream stream) {
  const rules::Program& program = plan.program;
  GatherKeysParams params{};
  params.from = from.data;
  params.to = to.data;
  params.order = program.key_order;
  params.seen_keys = plan.seen_keys;
  std::copy_n(from.stride, 3, params.from_stride);
  std::copy_n(to.stride, 3, params.to_stride);
  params.row_pieces = static_cast<int32_t>(from.shape[3] / 8);
  params.length = static_cast<int32_t>(from.shape[1]);
  params.heads = static_cast<int32_t>(from.shape[2]);
  params.order_batches = program.batches;
  params.orders = program.heads / program.order_divisor;
  params.order_heads = params.heads / params.orders;
  params.pieces = from.shape[0] * from.shape[1] * from.shape[2] * params.row_pieces;
  const int64_t blocks = (params.pieces + kGatherThreads - 1) / kGatherThreads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("attention: too many keys to reorder in one call: split the batch");
  }
  const int ordinal = from.device.index;
  launch(kernel(config(), ordinal), {static_cast<uint32_t>(blocks)}, stream, params);
}

std::vector<KernelConfig> gather_keys_kernels() { return {config()}; }

}  // namespace anymask::cuda
