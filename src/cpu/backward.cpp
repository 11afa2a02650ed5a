// The backward pass: a task per key tile of a key-value head, in one sweep over the scores.
//
// dk and dv belong to the task. dq does not: each key tile adds its share to every row tile that
// sees it, in the order of the key tiles, so that the sum is the same whatever the threads do. A
// counter per row tile says whose turn it is. Tasks are handed out in that same order, so the
// lowest unfinished task never waits and nothing can lock up; a task has its share ready in scratch
// before it waits, so little is done while others wait.
#include <algorithm>
#include <atomic>
#include <bit>
#include <thread>
#include <vector>

#include "cpu/backend.h"
#include "cpu/keys.h"
#include "cpu/score_gradients.h"
#include "cpu/scores.h"
#include "cpu/threads.h"
#include "cpu/view.h"
#include "cpu/words.h"

namespace anymask::cpu {
namespace {

// dq is summed in float. fp32 and fp64 sum in the caller's dq; bf16 and fp16 in this much memory at
// most (or two key-value heads' worth, if that is more), handed from head to head.
constexpr int64_t kSumBytes = int64_t{64} << 20;

// Neighbouring tasks belong to different heads where there are several, so that a task's turn has
// mostly come before it asks: with the tasks of one head side by side, a thread that the system
// interrupts holds up all others.
constexpr int64_t kWaveHeads = 16;

constexpr size_t kWordsBytes = kTileWords * sizeof(uint32_t);

void wait_for(const std::atomic<int32_t>& counter, int32_t value) {
  for (int spins = 0; counter.load(std::memory_order_acquire) != value; ++spins) {
    if (spins < 256) {
      __builtin_ia32_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

class Backward {
 public:
  explicit Backward(const BackwardCall& call);
  void run();

 private:
  void start_rows(int64_t task);
  void key_tile(int64_t first_head, int64_t heads, int64_t task, int thread);
  void add_dq(const BackwardJob& job, int64_t b, int64_t h, int64_t row_tile, int rows,
              int64_t key_tile);

  RowsOut sums_at(int64_t b, int64_t h, int64_t row) const;
  void wait_for_slot(int64_t b, int64_t h, int64_t row_tile);

  int64_t place_at(int64_t b, int64_t h) const {
    return place_index(*call_.program, place_of(*call_.program, b, h, q_heads_));
  }
  int rows_of(int64_t row_tile) const {
    return static_cast<int>(std::min<int64_t>(tile_rows_, q_len_ - row_tile * tile_rows_));
  }
  std::atomic<int32_t>& turn(int64_t b, int64_t h, int64_t row_tile) {
    return turns_[static_cast<size_t>((b * q_heads_ + h) * row_tiles_ + row_tile)];
  }
  char* delta_at(int64_t b, int64_t h, int64_t row) const {
    return static_cast<char*>(delta_.get()) + ((b * q_heads_ + h) * q_len_ + row) * sum_size_;
  }

  const BackwardCall& call_;
  const BackwardKernel& kernel_;
  const TileScores scores_;
  ScoreGradients score_gradients_;
  const int64_t batch_, q_len_, q_heads_, kv_len_, kv_heads_, group_, head_dim_, v_head_dim_;
  const int64_t tile_rows_, tile_keys_, row_tiles_, key_tiles_;
  const int64_t sum_size_;  // bytes of a sum's element
  bool own_sums_ = false;   // 16-bit types: dq is summed in sums_
  int64_t slots_ = 1;       // key-value heads whose sums fit into sums_
  int64_t wave_ = 1;        // key-value heads worked on at a time
  const int team_ = threads();
  Memory sums_, delta_, scratch_;
  size_t kernel_bytes_ = 0, k_bytes_ = 0, v_bytes_ = 0, thread_bytes_ = 0;
  std::vector<std::atomic<int32_t>> turns_;
};

Backward::Backward(const BackwardCall& call)
    : call_(call),
      kernel_(kernels().backward[static_cast<int>(element_of(call.q.dtype))]),
      scores_(call.scores, call.q, call.rows.shape),
      score_gradients_(call),
      batch_(call.q.shape[0]),
      q_len_(call.q.shape[1]),
      q_heads_(call.q.shape[2]),
      kv_len_(call.k.shape[1]),
      kv_heads_(call.k.shape[2]),
      group_(kv_heads_ == 0 ? 1 : q_heads_ / kv_heads_),
      head_dim_(call.q.shape[3]),
      v_head_dim_(call.v.shape[3]),
      tile_rows_(call.rows.shape.rows),
      tile_keys_(call.rows.shape.columns),
      row_tiles_(tiles_in(q_len_, call.rows.shape.rows)),
      key_tiles_(tiles_in(kv_len_, call.rows.shape.columns)),
      sum_size_(call.q.dtype == DType::f64 ? 8 : 4),
      own_sums_(size_of(call.q.dtype) == 2),
      turns_(static_cast<size_t>(batch_ * q_heads_ * row_tiles_)) {
  delta_ = allocate(static_cast<size_t>(batch_ * q_heads_ * q_len_ * sum_size_));
  kernel_bytes_ =
      page_up(kernel_.scratch_bytes(static_cast<int>(tile_rows_), static_cast<int>(tile_keys_),
                                    static_cast<int>(head_dim_), static_cast<int>(v_head_dim_)));
  k_bytes_ = page_up(gathered_bytes(call.k, tile_keys_));
  v_bytes_ = page_up(gathered_bytes(call.v, tile_keys_));
  thread_bytes_ = kernel_bytes_ + kWordsBytes + k_bytes_ + v_bytes_ + scores_.bytes() +
                  score_gradients_.bytes();
  scratch_ = allocate(thread_bytes_ * static_cast<size_t>(team_));
  wave_ = std::min(score_gradients_.heads_a_round(), kWaveHeads);
  if (own_sums_) {
    const int64_t slot = std::max<int64_t>(1, group_ * q_len_ * head_dim_ * 4);
    const int64_t heads = std::max<int64_t>(1, batch_ * kv_heads_);
    slots_ = std::min(heads, std::max<int64_t>(2, kSumBytes / slot));
    sums_ = allocate(static_cast<size_t>(slots_ * slot));
    wave_ = std::min(wave_, slots_);
  }
}

void Backward::run() {
  score_gradients_.begin();
  parallel_for(batch_ * q_heads_ * row_tiles_, [&](int64_t task, int) { start_rows(task); });
  const int64_t heads = score_gradients_.heads_a_round();  // all of them, mostly
  for (int64_t first = 0; first < batch_ * kv_heads_; first += heads) {
    const auto task = [&](int64_t index, int thread) { key_tile(first, heads, index, thread); };
    parallel_for(heads * key_tiles_, task, team_);
  }
  score_gradients_.end();
}

// delta of a row tile, and dq = 0 where it sees no key tile.
void Backward::start_rows(int64_t task) {
  const int64_t b = task / (q_heads_ * row_tiles_), h = task / row_tiles_ % q_heads_;
  const int64_t row_tile = task % row_tiles_, row = row_tile * tile_rows_;
  const int rows = rows_of(row_tile);
  kernel_.delta(rows_in(call_.dout, b, row, h), rows_in(call_.out, b, row, h),
                call_.dlse.given() ? element_at(call_.dlse, b, h, row) : nullptr, rows,
                static_cast<int>(v_head_dim_), delta_at(b, h, row));
  if (const double* sink = scores_.sinks(h); sink != nullptr) {
    score_gradients_.add_rows(b, h, row_tile, rows, *sink, element_at(call_.lse, b, h, row),
                              delta_at(b, h, row));
  }
  const bool blind =
      kv_len_ == 0 || call_.rows.count[place_at(b, h) * call_.rows.outer_tiles + row_tile] == 0;
  if (!blind) return;
  const size_t bytes = static_cast<size_t>(head_dim_ * size_of(call_.dq.dtype));
  for (int r = 0; r < rows; ++r) std::fill_n(row_at(call_.dq, b, row + r, h), bytes, char{0});
}

void Backward::key_tile(int64_t first_head, int64_t heads, int64_t task, int thread) {
  // Key tile by key tile through the heads of a wave.
  const int64_t first = task / (wave_ * key_tiles_) * wave_;
  const int64_t in_wave = task - first * key_tiles_, wave = std::min(wave_, heads - first);
  const int64_t head = first_head + first + in_wave % wave, tile = in_wave / wave;
  const int64_t b = head / kv_heads_, kv_head = head % kv_heads_, key = tile * tile_keys_;
  char* scratch = static_cast<char*>(scratch_.get()) + thread_bytes_ * static_cast<size_t>(thread);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch + kernel_bytes_);

  char* gathered_k = scratch + kernel_bytes_ + kWordsBytes;
  char* gathered_v = gathered_k + k_bytes_;
  char* score_memory = gathered_v + v_bytes_;
  char* gradient_memory = score_memory + scores_.bytes();

  BackwardJob job{};
  job.keys = static_cast<int>(std::min(tile_keys_, kv_len_ - key));
  const TileKeys keys{
      call_.program, place_of(*call_.program, b, kv_head * group_, q_heads_), b, kv_head, key,
      job.keys};
  job.k = keys_in(call_.k, keys, gathered_k);
  job.v = keys_in(call_.v, keys, gathered_v);
  job.tile_rows = static_cast<int>(tile_rows_);
  job.tile_keys = static_cast<int>(tile_keys_);
  job.head_dim = static_cast<int>(head_dim_);
  job.v_head_dim = static_cast<int>(v_head_dim_);
  job.scale = call_.scale;
  job.changes = scores_.changes(score_memory);
  job.dlogits = score_gradients_.dlogits(gradient_memory);
  job.scratch = scratch;
  kernel_.begin(job);
  for (int64_t h = kv_head * group_; h < (kv_head + 1) * group_ && q_len_ > 0; ++h) {
    const rules::Place place = place_of(*call_.program, b, h, q_heads_);
    for_visible(call_.columns, place_index(*call_.program, place), tile,
                [&](int64_t row_tile, bool some, int64_t next) {
                  const int64_t row = row_tile * tile_rows_;
                  RowTile rows{};
                  rows.q = rows_in(call_.q, b, row, h);
                  rows.dout = rows_in(call_.dout, b, row, h);
                  rows.lse = element_at(call_.lse, b, h, row);
                  rows.delta = delta_at(b, h, row);
                  rows.rows = rows_of(row_tile);
                  if (next >= 0) {
                    rows.next_q = row_at(call_.q, b, next * tile_rows_, h);
                    rows.next_dout = row_at(call_.dout, b, next * tile_rows_, h);
                  }
                  rows.dq = sums_at(b, h, row);
                  if (some) {
                    tile_words(*call_.program, place,
                               {static_cast<int>(row), static_cast<int>(row) + rows.rows,
                                static_cast<int>(key), static_cast<int>(key) + job.keys},
                               words);
                    rows.words = {words, kWordsStride};
                  }
                  if (scores_.any()) {
                    rows.biases = scores_.biases(keys, h, row, rows.rows, false, score_memory);
                    rows.kept = scores_.kept(keys, h, row, rows.rows, score_memory);
                  }
                  kernel_.tile(job, rows);
                  if (job.dlogits != nullptr) {
                    score_gradients_.add_tile(keys, h, row, rows.rows, gradient_memory);
                  }
                  add_dq(job, b, h, row_tile, rows.rows, tile);
                });
  }
  // The tile's own keys and values are no longer needed: their buffers take dk and dv.
  kernel_.end(job, keys_out(call_.dk, keys, gathered_k), keys_out(call_.dv, keys, gathered_v));
  scatter_keys(call_.dk, keys, gathered_k);
  scatter_keys(call_.dv, keys, gathered_v);
}

// Where the dq of rows from `row` on is summed.
RowsOut Backward::sums_at(int64_t b, int64_t h, int64_t row) const {
  if (!own_sums_) return rows_out(call_.dq, b, row, h);
  const int64_t slot = (b * kv_heads_ + h / group_) % slots_;
  const int64_t at = ((slot * group_ + h % group_) * q_len_ + row) * head_dim_;
  return {static_cast<float*>(sums_.get()) + at, head_dim_};
}

// That memory was an earlier head's: waits until its row tile has been rounded.
void Backward::wait_for_slot(int64_t b, int64_t h, int64_t row_tile) {
  const int64_t old = b * kv_heads_ + h / group_ - slots_;
  if (old < 0) return;
  const int64_t old_b = old / kv_heads_, old_h = old % kv_heads_ * group_ + h % group_;
  wait_for(turn(old_b, old_h, row_tile),
           call_.rows.count[place_at(old_b, old_h) * call_.rows.outer_tiles + row_tile]);
}

void Backward::add_dq(const BackwardJob& job, int64_t b, int64_t h, int64_t row_tile, int rows,
                      int64_t key_tile) {
  const int64_t place = place_at(b, h), row = row_tile * tile_rows_;
  const uint32_t* visible = bits_of(call_.rows.visible, call_.rows, place, row_tile);
  int rank = std::popcount(visible[key_tile / 32] & ((1u << (key_tile % 32)) - 1u));
  for (int64_t w = 0; w < key_tile / 32; ++w) rank += std::popcount(visible[w]);
  const bool last = rank + 1 == call_.rows.count[place * call_.rows.outer_tiles + row_tile];

  const RowsOut dq = rows_out(call_.dq, b, row, h);
  if (own_sums_ && rank == 0) wait_for_slot(b, h, row_tile);
  const RowsOut sum = sums_at(b, h, row);
  std::atomic<int32_t>& counter = turn(b, h, row_tile);
  wait_for(counter, rank);
  kernel_.add_dq(job, rows, rank == 0, sum);
  if (own_sums_ && last) {
    kernel_.round({sum.data, sum.stride}, rows, static_cast<int>(head_dim_), dq);
  }
  counter.store(rank + 1, std::memory_order_release);
}

}  // namespace

void backward(const BackwardCall& call) { Backward(call).run(); }

}  // namespace anymask::cpu
