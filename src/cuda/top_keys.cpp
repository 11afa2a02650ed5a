#include "cuda/top_keys.h"

#include <algorithm>
#include <limits>

#include "anymask/error.hpp"

namespace anymask::cuda {
namespace {

constexpr KernelFamily family(const char* name, const char* function) {
  return {name,     "cuda/device/top_keys.h",
          nullptr,  "anymask::cuda::TopKeysParams",
          function, 0,
          false,    static_cast<int>(sizeof(TopKeysParams))};
}
constexpr KernelFamily kCount = family("top_keys_count", "anymask::cuda::count_keys");
constexpr KernelFamily kPlace = family("top_keys_place", "anymask::cuda::place_keys");
constexpr KernelFamily kEnds = family("top_keys_ends", "anymask::cuda::find_ends");

KernelConfig config_of(const KernelFamily& kernel_family, int threads) {
  KernelConfig config;
  config.family = &kernel_family;
  config.threads = threads;
  return config;
}
KernelConfig count_config() { return config_of(kCount, kSortThreads); }
KernelConfig place_config() { return config_of(kPlace, kSortThreads); }
KernelConfig ends_config() { return config_of(kEnds, kEndsThreads); }

// Enough warps to hide their own latency; more of them would count the same keys again.
constexpr int kWarpsOfMultiprocessor = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Grid grid_of(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported("top_keys: too many keys for one call: split the batch");
  }
  return {static_cast<uint32_t>(blocks)};
}

// What lies where in the workspace: two lists of items, then the digits' counts. Order and rank
// take the place of the second list once the last pass has read the first.
struct Layout {
  int64_t places, keys, tiles;

  explicit Layout(const Tensor& scores)
      : places(scores.shape[0] * scores.shape[1]),
        keys(places * scores.shape[2]),
        tiles(ceil_div(scores.shape[2], kTileKeys)) {}

  int64_t list_bytes() const { return ceil_div(keys * 8, 256) * 256; }
  int64_t bytes() const { return 2 * list_bytes() + places * tiles * kDigits * 4; }
};

}  // namespace

int64_t top_keys_workspace(const Tensor& scores) { return Layout(scores).bytes(); }

std::vector<TopKeysStep> top_keys_steps(const Tensor& scores, int64_t keep, int64_t q_len,
                                        const Tensor& ends, void* workspace, int multiprocessors) {
  const Layout layout(scores);
  if (layout.keys == 0) return {};
  auto* const memory = static_cast<char*>(workspace);
  uint64_t* const lists[2] = {reinterpret_cast<uint64_t*>(memory),
                              reinterpret_cast<uint64_t*>(memory + layout.list_bytes())};
  TopKeysParams params{};
  params.scores = static_cast<const float*>(scores.data);
  params.batch_stride = scores.stride[0];
  params.head_stride = scores.stride[1];
  params.key_stride = scores.stride[2];
  params.heads = static_cast<int32_t>(scores.shape[1]);
  params.places = layout.places;
  params.kv_len = static_cast<int32_t>(scores.shape[2]);
  params.q_len = static_cast<int32_t>(q_len);
  params.keep = static_cast<int32_t>(std::min<int64_t>(keep, scores.shape[2]));
  params.tiles = static_cast<int32_t>(layout.tiles);
  params.counts = reinterpret_cast<int32_t*>(memory + 2 * layout.list_bytes());
  params.order = reinterpret_cast<int32_t*>(lists[1]);
  params.rank = params.order + layout.keys;
  params.ends = static_cast<int32_t*>(ends.data);

  std::vector<TopKeysStep> steps;
  const Grid sort_grid = grid_of(layout.places * layout.tiles);
  for (params.pass = 0; params.pass < kSortPasses; ++params.pass) {
    params.to = lists[params.pass % 2];
    params.from = lists[1 - params.pass % 2];
    steps.push_back({count_config(), sort_grid, params});
    steps.push_back({place_config(), sort_grid, params});
  }

  const int64_t chunks = ceil_div(params.kv_len - params.keep, kChunkKeys);
  if (chunks == 0) return steps;
  const int64_t warps = std::max(1, kWarpsOfMultiprocessor * multiprocessors);
  params.warp_chunks =
      static_cast<int32_t>(std::min(ceil_div(layout.places * chunks, warps), chunks));
  params.warps = static_cast<int32_t>(ceil_div(chunks, params.warp_chunks));
  steps.push_back(
      {ends_config(), grid_of(ceil_div(layout.places * params.warps, kEndsWarps)), params});
  return steps;
}

void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends,
              void* workspace, CuStream stream) {
  const int ordinal = scores.device.index;
  const DeviceScope scope(ordinal);
  for (const TopKeysStep& step :
       top_keys_steps(scores, keep, q_len, ends, workspace, gpu(ordinal).multiprocessors)) {
    launch(kernel(step.config, ordinal), step.grid, stream, step.params);
  }
}

std::vector<KernelConfig> top_keys_kernels() {
  return {count_config(), place_config(), ends_config()};
}

}  // namespace anymask::cuda
