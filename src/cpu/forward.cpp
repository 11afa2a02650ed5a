// The forward pass: a task per query tile, every task on its own.
#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/keys.h"
#include "cpu/threads.h"
#include "cpu/view.h"
#include "cpu/words.h"

namespace anymask::cpu {
namespace {

// Where a thread's next task starts looking for memory: sizes rounded so that threads share no
// line.
size_t line_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

}  // namespace

void forward(const ForwardCall& call) {
  const Tensor& q = call.q;
  const int64_t batch = q.shape[0], q_len = q.shape[1], q_heads = q.shape[2];
  const int64_t kv_len = call.k.shape[1];
  const int64_t group = std::max<int64_t>(1, q_heads / std::max<int64_t>(1, call.k.shape[2]));
  const plan::TileMap& map = call.rows;
  const int64_t tiles = tiles_in(q_len, map.shape.rows);
  const int64_t tasks = batch * q_heads * tiles;
  if (tasks == 0) return;

  const ForwardKernel& kernel = kernels().forward[static_cast<int>(element_of(q.dtype))];
  ForwardJob shape{};
  shape.tile_rows = map.shape.rows;
  shape.tile_keys = map.shape.columns;
  shape.head_dim = static_cast<int>(q.shape[3]);
  shape.v_head_dim = static_cast<int>(call.v.shape[3]);
  shape.scale = call.scale;
  const size_t kernel_bytes = line_up(
      kernel.scratch_bytes(shape.tile_rows, shape.tile_keys, shape.head_dim, shape.v_head_dim));
  const size_t words_bytes = kTileWords * sizeof(uint32_t);
  const size_t k_bytes = line_up(gathered_bytes(call.k, shape.tile_keys));
  const size_t v_bytes = line_up(gathered_bytes(call.v, shape.tile_keys));
  const size_t thread_bytes = kernel_bytes + words_bytes + k_bytes + v_bytes;
  const Memory memory = allocate(thread_bytes * static_cast<size_t>(threads()));

  parallel_for(tasks, [&](int64_t task, int thread) {
    char* scratch = static_cast<char*>(memory.get()) + thread_bytes * static_cast<size_t>(thread);
    uint32_t* words = reinterpret_cast<uint32_t*>(scratch + kernel_bytes);
    char* gathered_k = scratch + kernel_bytes + words_bytes;
    char* gathered_v = gathered_k + k_bytes;
    const int64_t b = task / (q_heads * tiles), h = task / tiles % q_heads;
    const rules::Place place = place_of(*call.program, b, h, q_heads);
    const int64_t at = place_index(*call.program, place);
    const int64_t tile = map.order[at * map.outer_tiles + task % tiles];
    const int64_t row = tile * map.shape.rows;

    ForwardJob job = shape;
    job.q = rows_in(q, b, row, h);
    job.rows = static_cast<int>(std::min<int64_t>(map.shape.rows, q_len - row));
    job.scratch = scratch;
    kernel.begin(job);
    for_visible(map, at, tile, [&](int64_t key_tile, bool some, int64_t next) {
      const int64_t key = key_tile * map.shape.columns;
      KeyTile keys{};
      keys.keys = static_cast<int>(std::min<int64_t>(map.shape.columns, kv_len - key));
      const TileKeys from{call.program, place, b, h / group, key, keys.keys};
      keys.k = keys_in(call.k, from, gathered_k);
      keys.v = keys_in(call.v, from, gathered_v);
      if (next >= 0 && !from.reordered()) {
        keys.next_k = row_at(call.k, b, next * map.shape.columns, h / group);
        keys.next_v = row_at(call.v, b, next * map.shape.columns, h / group);
      }
      if (some) {
        tile_words(*call.program, place,
                   {static_cast<int>(row), static_cast<int>(row) + job.rows, static_cast<int>(key),
                    static_cast<int>(key) + keys.keys},
                   words);
        keys.words = {words, kWordsStride};
      }
      kernel.tile(job, keys);
    });
    kernel.end(job, rows_out(call.out, b, row, h), element_at(call.lse, b, h, row));
  });
}

}  // namespace anymask::cpu
