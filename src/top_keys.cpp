// Dynamic masks: checks a selection's arguments and hands it to a backend.
#include <algorithm>
#include <string>

#include "anymask/mask.hpp"
#include "cpu/top_keys.h"
#include "cuda/top_keys.h"
#include "mask/describe.h"

namespace anymask {
namespace {

void check_scores(const Tensor& scores) {
  if (scores.dtype != DType::f32) fail_dtype("scores", scores.dtype, "float32");
  if (scores.ndim != 3) fail_shape("scores", scores, "[batch, heads, kv_len]");
  if (scores.shape[2] >= (1 << 30)) {
    throw InvalidValue("scores has kv_len " + std::to_string(scores.shape[2]) +
                       "; it must be less than 2^30");
  }
}

bool contiguous(const Tensor& tensor) {
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.stride[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

}  // namespace

int64_t top_keys_workspace_bytes(const Tensor& scores) {
  check_scores(scores);
  return scores.device.type == DeviceType::cuda ? cuda::top_keys_workspace(scores) : 0;
}

void top_keys(const Tensor& scores, int64_t keep, int64_t q_len, const Tensor& ends, void* stream,
              void* workspace, int64_t workspace_bytes) {
  check_scores(scores);
  if (keep < 0) {
    throw InvalidValue("keep is " + std::to_string(keep) + "; it must be 0 or more");
  }
  if (q_len < 0 || q_len >= (1 << 30)) {
    throw InvalidValue("q_len is " + std::to_string(q_len) + "; it must be from 0 to 2^30 - 1");
  }
  const int64_t wanted[4] = {scores.shape[0], scores.shape[1], scores.shape[2], 1};
  if (ends.dtype != DType::i32) fail_dtype("ends", ends.dtype, "int32");
  if (ends.ndim != 4 || !std::equal(wanted, wanted + 4, ends.shape)) {
    fail_shape("ends", ends, shape_text({wanted[0], wanted[1], wanted[2], 1}));
  }
  if (wanted[0] * wanted[1] * wanted[2] == 0) return;
  if (!contiguous(ends)) throw InvalidValue("ends must be contiguous");
  if (ends.device != scores.device) {
    throw InvalidType("ends is on " + device_text(ends.device) + "; scores is on " +
                      device_text(scores.device));
  }
  if (scores.device.type == DeviceType::cpu) return cpu::top_keys(scores, keep, q_len, ends);

  const int64_t needed = cuda::top_keys_workspace(scores);
  if (workspace_bytes < needed || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw InvalidValue("workspace has " + std::to_string(workspace_bytes) +
                       " bytes; this selection needs " + std::to_string(needed) +
                       ", aligned to 256");
  }
  cuda::top_keys(scores, keep, q_len, ends, workspace, static_cast<cuda::CuStream>(stream));
}

}  // namespace anymask
