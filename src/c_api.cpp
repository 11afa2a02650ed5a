// The C ABI: plain structs in, a status out. Converts, calls the C++ API, catches.
#include "anymask/anymask.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <string>

#include "anymask/anymask.hpp"

namespace {

using namespace anymask;

thread_local std::string last_error;

// Runs `body`; turns what it throws into a status and a message.
template <typename Body>
anymask_status guarded(const Body& body) noexcept {
  const auto failed = [](anymask_status status, const char* message) {
    last_error = message;
    return status;
  };
  try {
    body();
    return ANYMASK_OK;
  } catch (const InvalidValue& error) {
    return failed(ANYMASK_INVALID_VALUE, error.what());
  } catch (const InvalidType& error) {
    return failed(ANYMASK_INVALID_TYPE, error.what());
  } catch (const Unsupported& error) {
    return failed(ANYMASK_UNSUPPORTED, error.what());
  } catch (const std::bad_alloc&) {
    return failed(ANYMASK_RUNTIME_FAILURE, "out of memory");
  } catch (const std::exception& error) {
    return failed(ANYMASK_RUNTIME_FAILURE, error.what());
  }
}

Tensor tensor_from(const anymask_tensor& from) {
  if (from.ndim < 0 || from.ndim > 4) {
    throw InvalidValue("a tensor has " + std::to_string(from.ndim) +
                       " dimensions; at most 4 are possible");
  }
  if (from.dtype < ANYMASK_F32 || from.dtype > ANYMASK_I16) {
    throw InvalidType("a tensor has the unknown dtype code " + std::to_string(from.dtype));
  }
  Tensor tensor;
  tensor.data = from.data;
  tensor.dtype = static_cast<DType>(from.dtype);
  tensor.device = {static_cast<DeviceType>(from.device_type), from.device_index};
  tensor.ndim = from.ndim;
  std::copy_n(from.shape, 4, tensor.shape);
  std::copy_n(from.stride, 4, tensor.stride);
  return tensor;
}

Mask mask_from(const anymask_mask& from) {
  std::vector<MaskNode> nodes;
  nodes.reserve(static_cast<size_t>(from.count));
  for (int64_t i = 0; i < from.count; ++i) {
    const anymask_node& node = from.nodes[i];
    MaskNode& to = nodes.emplace_back();
    to.kind = static_cast<MaskKind>(node.kind);
    to.left = node.left;
    to.right = node.right;
    to.arrays[0] = tensor_from(node.arrays[0]);
    to.arrays[1] = tensor_from(node.arrays[1]);
  }
  return Mask(std::move(nodes));
}

Problem problem_from(const anymask_problem& from) {
  return {.batch = from.batch,
          .q_heads = from.q_heads,
          .kv_heads = from.kv_heads,
          .q_len = from.q_len,
          .kv_len = from.kv_len,
          .head_dim = from.head_dim,
          .v_head_dim = from.v_head_dim,
          .dtype = static_cast<DType>(from.dtype),
          .device = {static_cast<DeviceType>(from.device_type), from.device_index}};
}

std::optional<double> scale_from(double scale) {
  return std::isnan(scale) ? std::nullopt : std::optional<double>(scale);
}

ScoreOptions scores_from(const anymask_score_options* from) {
  if (from == nullptr) return {};
  return {.key_bias = tensor_from(from->key_bias),
          .bias = tensor_from(from->bias),
          .sink = tensor_from(from->sink),
          .seed_offset = tensor_from(from->seed_offset),
          .softcap = from->softcap,
          .dropout_p = from->dropout_p};
}

ScoreGradientViews gradients_from(const anymask_score_gradients* from) {
  if (from == nullptr) return {};
  return {.dkey_bias = tensor_from(from->dkey_bias),
          .dbias = tensor_from(from->dbias),
          .dsink = tensor_from(from->dsink)};
}

void write_text(const std::string& text, char* target, int64_t size) {
  if (size < static_cast<int64_t>(text.size()) + 1) {
    throw InvalidValue("size is " + std::to_string(size) + "; the text needs " +
                       std::to_string(text.size() + 1));
  }
  std::memcpy(target, text.c_str(), text.size() + 1);
}

}  // namespace

extern "C" {

const char* anymask_version(void) { return ANYMASK_VERSION; }
const char* anymask_last_error(void) { return last_error.c_str(); }

anymask_status anymask_plan_bytes(const anymask_mask* mask, const anymask_problem* problem,
                                  int64_t* bytes) {
  return guarded([&] { *bytes = plan_bytes(mask_from(*mask), problem_from(*problem)); });
}

anymask_status anymask_build_plan(const anymask_mask* mask, const anymask_problem* problem,
                                  void* buffer, int64_t bytes, void* stream) {
  return guarded(
      [&] { build_plan(mask_from(*mask), problem_from(*problem), buffer, bytes, stream); });
}

anymask_status anymask_build_forward_plan(const anymask_mask* mask, const anymask_problem* problem,
                                          void* buffer, int64_t bytes, void* stream) {
  return guarded([&] {
    build_plan(mask_from(*mask), problem_from(*problem), buffer, bytes, stream, Passes::forward);
  });
}

anymask_status anymask_forward_workspace_bytes(const anymask_mask* mask,
                                               const anymask_problem* problem, int64_t* bytes) {
  return guarded(
      [&] { *bytes = forward_workspace_bytes(mask_from(*mask), problem_from(*problem)); });
}

anymask_status anymask_backward_workspace_bytes(const anymask_mask* mask,
                                                const anymask_problem* problem,
                                                int32_t deterministic,
                                                const anymask_score_options* scores,
                                                const anymask_score_gradients* score_gradients,
                                                int64_t* bytes) {
  return guarded([&] {
    *bytes = backward_workspace_bytes(mask_from(*mask), problem_from(*problem), deterministic != 0,
                                      scores_from(scores), gradients_from(score_gradients));
  });
}

anymask_status anymask_attention_forward(const anymask_forward_args* args) {
  return guarded([&] {
    ForwardArgs call;
    call.q = tensor_from(args->q);
    call.k = tensor_from(args->k);
    call.v = tensor_from(args->v);
    call.out = tensor_from(args->out);
    call.lse = tensor_from(args->lse);
    call.mask = mask_from(args->mask);
    call.plan = args->plan;
    call.plan_bytes = args->plan_bytes;
    call.scale = scale_from(args->scale);
    call.scores = scores_from(args->scores);
    call.stream = args->stream;
    call.workspace = args->workspace;
    call.workspace_bytes = args->workspace_bytes;
    attention_forward(call);
  });
}

anymask_status anymask_attention_backward(const anymask_backward_args* args) {
  return guarded([&] {
    BackwardArgs call;
    call.q = tensor_from(args->q);
    call.k = tensor_from(args->k);
    call.v = tensor_from(args->v);
    call.out = tensor_from(args->out);
    call.lse = tensor_from(args->lse);
    call.dout = tensor_from(args->dout);
    call.dlse = tensor_from(args->dlse);
    call.dq = tensor_from(args->dq);
    call.dk = tensor_from(args->dk);
    call.dv = tensor_from(args->dv);
    call.mask = mask_from(args->mask);
    call.plan = args->plan;
    call.plan_bytes = args->plan_bytes;
    call.scale = scale_from(args->scale);
    call.scores = scores_from(args->scores);
    const ScoreGradientViews gradients = gradients_from(args->score_gradients);
    call.dkey_bias = gradients.dkey_bias;
    call.dbias = gradients.dbias;
    call.dsink = gradients.dsink;
    call.deterministic = args->deterministic != 0;
    call.stream = args->stream;
    call.workspace = args->workspace;
    call.workspace_bytes = args->workspace_bytes;
    attention_backward(call);
  });
}

anymask_status anymask_mask_shape(const anymask_mask* mask, const anymask_problem* problem,
                                  int64_t* batches, int64_t* heads) {
  return guarded([&] {
    const MaskShape shape = mask_shape(mask_from(*mask), problem_from(*problem));
    *batches = shape.batches;
    *heads = shape.heads;
  });
}

anymask_status anymask_mask_statistics(const anymask_mask* mask, const anymask_problem* problem,
                                       int64_t tile_rows, int64_t tile_columns,
                                       anymask_statistics* statistics) {
  return guarded([&] {
    const MaskStatistics found =
        mask_statistics(mask_from(*mask), problem_from(*problem), tile_rows, tile_columns);
    *statistics = {found.pairs, found.visible_pairs, found.tiles, found.all_tiles,
                   found.some_tiles};
  });
}

anymask_status anymask_mask_to_dense(const anymask_mask* mask, const anymask_problem* problem,
                                     const anymask_tensor* allowed) {
  return guarded(
      [&] { mask_to_dense(mask_from(*mask), problem_from(*problem), tensor_from(*allowed)); });
}

anymask_status anymask_mask_tile_classes(const anymask_mask* mask, const anymask_problem* problem,
                                         int64_t tile_rows, int64_t tile_columns,
                                         const anymask_tensor* classes) {
  return guarded([&] {
    mask_tile_classes(mask_from(*mask), problem_from(*problem), tile_rows, tile_columns,
                      tensor_from(*classes));
  });
}

anymask_status anymask_intervals_from_dense(const anymask_tensor* allowed, int32_t causal,
                                            const anymask_tensor* indices, int32_t* columns) {
  return guarded([&] {
    *columns = intervals_from_dense(tensor_from(*allowed), causal != 0, tensor_from(*indices));
  });
}

anymask_status anymask_top_keys_workspace_bytes(const anymask_tensor* scores, int64_t* bytes) {
  return guarded([&] { *bytes = top_keys_workspace_bytes(tensor_from(*scores)); });
}

anymask_status anymask_top_keys(const anymask_tensor* scores, int64_t keep, int64_t q_len,
                                const anymask_tensor* ends, void* stream, void* workspace,
                                int64_t workspace_bytes) {
  return guarded([&] {
    top_keys(tensor_from(*scores), keep, q_len, tensor_from(*ends), stream, workspace,
             workspace_bytes);
  });
}

anymask_status anymask_cpu_instruction_sets(char* names, int64_t size) {
  return guarded([&] {
    std::string joined;
    for (const std::string& name : cpu_instruction_sets()) {
      joined += (joined.empty() ? "" : ",") + name;
    }
    write_text(joined, names, size);
  });
}

anymask_status anymask_cpu_instruction_set(char* name, int64_t size) {
  return guarded([&] { write_text(cpu_instruction_set(), name, size); });
}

anymask_status anymask_set_cpu_instruction_set(const char* name) {
  return guarded([&] { set_cpu_instruction_set(name); });
}

anymask_status anymask_set_cpu_threads(int32_t threads) {
  return guarded([&] { set_cpu_threads(threads); });
}

anymask_status anymask_cpu_threads(int32_t* threads) {
  return guarded([&] { *threads = cpu_threads(); });
}

anymask_status anymask_measure_cpu_peak(int32_t dtype, double* gflops) {
  return guarded([&] { *gflops = measure_cpu_peak(static_cast<DType>(dtype)); });
}

anymask_status anymask_cuda_report(char* json, int64_t* size) {
  return guarded([&] {
    const std::string report = cuda_report();
    const int64_t room = *size;
    *size = static_cast<int64_t>(report.size()) + 1;
    write_text(report, json, room);
  });
}

anymask_status anymask_warm_up_cuda(int32_t capability, int32_t* kernels) {
  return guarded([&] { *kernels = warm_up_cuda(capability); });
}

anymask_status anymask_add_cuda_library_folder(const char* folder) {
  return guarded([&] { add_cuda_library_folder(folder); });
}

anymask_status anymask_set_cuda_package_cache(const char* folder) {
  return guarded([&] { set_cuda_package_cache(folder); });
}

}  // extern "C"
