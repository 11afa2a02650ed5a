// A small problem for tests that look at masks only.
#pragma once

#include "anymask/types.hpp"

namespace anymask {

inline Problem small_problem(int q_len, int kv_len, int batch = 1, int heads = 1) {
  return {.batch = batch,
          .q_heads = heads,
          .kv_heads = heads,
          .q_len = q_len,
          .kv_len = kv_len,
          .head_dim = 16,
          .v_head_dim = 16};
}

}  // namespace anymask
