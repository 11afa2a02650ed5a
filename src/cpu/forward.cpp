// The forward pass: a task per query tile, every task on its own.
#include <algorithm>

#include "cpu/backend.h"
#include "cpu/keys.h"
#include "cpu/scores.h"
#include "cpu/threads.h"
#include "cpu/view.h"
#include "cpu/words.h"
#include "rules/evaluate.h"

namespace anymask::cpu {
namespace {

constexpr size_t kWordsBytes = kTileWords * sizeof(uint32_t);

class Forward {
 public:
  explicit Forward(const ForwardCall& call);
  void run();

 private:
  const ForwardKernel& kernel_for(int64_t rows) const;
  void query_tile(int64_t task, int thread) const;
  void fill_words(rules::Place place, int64_t row, int64_t key, int rows, int keys,
                  uint32_t* words) const;

  const ForwardCall& call_;
  const TileScores scores_;
  const int64_t batch_, q_len_, q_heads_, kv_len_, group_, tiles_;
  // Decoding: the heads that share keys are the rows of one tile, where single rows would leave
  // most lanes empty and each head would read all keys again.
  const bool decoding_;
  const int64_t task_heads_;  // query heads per task
  const ForwardKernel& kernel_;
  ForwardJob shape_{};
  size_t kernel_bytes_, k_bytes_, v_bytes_, thread_bytes_;
  const int team_ = threads();
  Memory memory_;
};

Forward::Forward(const ForwardCall& call)
    : call_(call),
      scores_(call.scores, call.q, call.rows.shape),
      batch_(call.q.shape[0]),
      q_len_(call.q.shape[1]),
      q_heads_(call.q.shape[2]),
      kv_len_(call.k.shape[1]),
      group_(q_heads_ / std::max<int64_t>(1, call.k.shape[2])),
      tiles_(tiles_in(q_len_, call.rows.shape.rows)),
      decoding_(q_len_ == 1 && group_ > 1 && group_ <= call.rows.shape.rows &&
                q_heads_ / call.program->heads % group_ == 0 && call.lse.stride[1] == 1 &&
                scores_.groups_may_share(group_)),
      task_heads_(decoding_ ? group_ : 1),
      kernel_(kernel_for(decoding_ ? group_ : q_len_)) {
  shape_.tile_rows = call.rows.shape.rows;
  shape_.tile_keys = call.rows.shape.columns;
  shape_.head_dim = static_cast<int>(call.q.shape[3]);
  shape_.v_head_dim = static_cast<int>(call.v.shape[3]);
  shape_.scale = call.scale;
  kernel_bytes_ = page_up(kernel_.scratch_bytes(shape_.tile_rows, shape_.tile_keys, shape_.head_dim,
                                                shape_.v_head_dim));
  k_bytes_ = page_up(gathered_bytes(call.k, shape_.tile_keys));
  v_bytes_ = page_up(gathered_bytes(call.v, shape_.tile_keys));
  thread_bytes_ = kernel_bytes_ + kWordsBytes + k_bytes_ + v_bytes_ + scores_.bytes();
  memory_ = allocate(thread_bytes_ * static_cast<size_t>(team_));
}

const ForwardKernel& Forward::kernel_for(int64_t rows) const {
  const int element = static_cast<int>(element_of(call_.q.dtype));
  const bool few = rows <= kernels().most_few_rows[element] && !scores_.any();
  return few ? kernels().few_rows[element] : kernels().forward[element];
}

void Forward::run() {
  const auto task = [&](int64_t index, int thread) { query_tile(index, thread); };
  parallel_for(batch_ * (q_heads_ / task_heads_) * tiles_, task, team_);
}

void Forward::query_tile(int64_t task, int thread) const {
  char* scratch = static_cast<char*>(memory_.get()) + thread_bytes_ * static_cast<size_t>(thread);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch + kernel_bytes_);
  char* gathered_k = scratch + kernel_bytes_ + kWordsBytes;
  char* gathered_v = gathered_k + k_bytes_;
  char* score_memory = gathered_v + v_bytes_;

  const int64_t heads = q_heads_ / task_heads_;
  const int64_t b = task / (heads * tiles_), h = task / tiles_ % heads * task_heads_;
  const plan::TileMap& map = call_.rows;
  const rules::Place place = place_of(*call_.program, b, h, q_heads_);
  const int64_t at = place_index(*call_.program, place);
  const int64_t tile = map.order[at * map.outer_tiles + task % tiles_];
  const int64_t row = tile * map.shape.rows;

  ForwardJob job = shape_;
  job.q = rows_in(call_.q, b, row, h);
  job.rows = static_cast<int>(std::min<int64_t>(map.shape.rows, q_len_ - row));
  RowsOut out = rows_out(call_.out, b, row, h);
  if (decoding_) {
    job.q.stride = call_.q.stride[2];
    job.rows = static_cast<int>(group_);
    out.stride = call_.out.stride[2];
  }
  job.changes = scores_.changes(score_memory);
  job.sinks = scores_.sinks(h);
  job.sink_stride = decoding_ ? 1 : 0;
  job.scratch = scratch;
  kernel_.begin(job);
  for_visible(map, at, tile, [&](int64_t key_tile, bool some, int64_t next) {
    const int64_t key = key_tile * map.shape.columns;
    KeyTile keys{};
    keys.keys = static_cast<int>(std::min<int64_t>(map.shape.columns, kv_len_ - key));
    const TileKeys from{call_.program, place, b, h / group_, key, keys.keys};
    keys.k = keys_in(call_.k, from, gathered_k);
    keys.v = keys_in(call_.v, from, gathered_v);
    if (next >= 0 && !from.reordered()) {
      keys.next_k = row_at(call_.k, b, next * map.shape.columns, h / group_);
      keys.next_v = row_at(call_.v, b, next * map.shape.columns, h / group_);
    }
    if (some) {
      fill_words(place, row, key, job.rows, keys.keys, words);
      keys.words = {words, kWordsStride};
    }
    if (scores_.any()) {
      keys.biases = scores_.biases(from, h, row, job.rows, decoding_, score_memory);
      keys.kept = scores_.kept(from, h, row, job.rows, score_memory);
    }
    kernel_.tile(job, keys);
  });
  kernel_.end(job, out, element_at(call_.lse, b, h, row));
}

void Forward::fill_words(rules::Place place, int64_t row, int64_t key, int rows, int keys,
                         uint32_t* words) const {
  const int mask_rows = decoding_ ? 1 : rows;
  tile_words(*call_.program, place,
             {static_cast<int>(row), static_cast<int>(row) + mask_rows, static_cast<int>(key),
              static_cast<int>(key) + keys},
             words);
  if (!decoding_) return;
  // All heads see what the one row sees.
  for (int group = (rows - 1) / kGroupRows; group >= 0; --group) {
    const uint32_t exist = rules::low_bits(rows - group * kGroupRows);
    for (int i = 0; i < keys; ++i) {
      words[group * kWordsStride + i] = (words[i] & 1u) != 0 ? exist : 0u;
    }
  }
}

}  // namespace

void forward(const ForwardCall& call) {
  if (call.q.shape[0] * call.q.shape[1] * call.q.shape[2] == 0) return;
  Forward(call).run();
}

}  // namespace anymask::cpu
