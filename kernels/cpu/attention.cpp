#include "attention.h"

#include <algorithm>
#include <cmath>

#include "layout.h"
#include "micro.h"
#include "scratch.h"
#include "softmax.h"
#include "tiles.h"

namespace chunkllama {
namespace {

constexpr float LOG2E = 1.44269504f;

struct Buffers {
  Scratch<float> q, out, max, sum, scores;
  Scratch<bf16> q_pairs, probs, v_tail;
};

// One item for one kv head: `rows` query rows, row i being head i % group of token row i / group.
template <class T>
struct Unit {
  Unit(const AttentionArgs& a, int64_t index)
      : args(a), item(a.plan.items + index / a.heads.kv_heads * ITEM_COLUMNS), head(index % a.heads.kv_heads) {
    group = int(a.heads.q_heads / a.heads.kv_heads);
    rows = item[NUM_ROWS] * group;
    dim = a.heads.head_dim;
    masked = item[FLAGS] & ITEM_MASK;
    tokens = item[NUM_TOKENS];
    if (masked) tokens = std::min(tokens, a.positions[item[ROW_BEGIN] + item[NUM_ROWS] - 1] + 1 - item[FIRST_POSITION]);
    tokens = std::max(tokens, 0);
    chunks = (tokens + CHUNK - 1) / CHUNK;
    steps = (chunks + STEP_CHUNKS - 1) / STEP_CHUNKS;
  }

  const T* chunk(int i) const {
    return static_cast<const T*>(args.kv) + args.plan.chunk_ids[item[CHUNK_OFFSET] + i] * Layout<T>::chunk(args.heads.kv_heads, dim);
  }
  const T* k(int i) const { return chunk(i) + Layout<T>::k_offset(head, dim); }
  const T* v(int i) const { return chunk(i) + Layout<T>::v_offset(head, args.heads.kv_heads, dim); }
  int chunks_of(int step) const { return std::min(STEP_CHUNKS, chunks - step * STEP_CHUNKS); }
  int tokens_of(int step) const { return std::min(STEP_KEYS, tokens - step * STEP_KEYS); }

  void prefetch(int step, Prefetcher& ahead) const {
    if (step >= steps) return;
    for (int j = 0; j < chunks_of(step); j++) {
      const int n = std::min(CHUNK, tokens_of(step) - j * CHUNK), i = step * STEP_CHUNKS + j;
      ahead.add(k(i), Layout<T>::k_used(n, dim) * sizeof(T));
      ahead.add(v(i), Layout<T>::v_used(n, dim) * sizeof(T));
    }
  }

  // Keys of the step that each of the rows [first, first + count) sees; false if none of them sees any.
  // `cut` tells whether some row does not see all `keys` columns of the scores.
  bool visible(int step, int first, int count, int keys, int* out, bool* cut) const {
    const int valid = tokens_of(step), position = item[FIRST_POSITION] + step * STEP_KEYS;
    int least = valid, most = valid;
    if (masked) most = 0;
    for (int r = 0; r < count; r++) {
      out[r] = masked ? std::min(valid, args.positions[item[ROW_BEGIN] + (first + r) / group] + 1 - position) : valid;
      least = std::min(least, out[r]);
      most = std::max(most, out[r]);
    }
    *cut = least < keys;
    return most > 0;
  }

  const AttentionArgs& args;
  const int32_t* item;
  int64_t head;
  long dim;
  int group, rows, tokens, chunks, steps;
  bool masked;
};

template <class Q, class T, class Out>
void gather_queries(const Unit<T>& u, Out* to, long stride) {
  const Q* q = static_cast<const Q*>(u.args.q);
  for (int i = 0; i < u.rows; i++) {
    const Q* from = q + (u.item[ROW_BEGIN] + i / u.group) * u.args.q_stride + (u.head * u.group + i % u.group) * u.dim;
    Out* row = to + i * stride;
    for (long d = 0; d < u.dim; d += W) store(row + d, load(from + d));
    for (long d = u.dim; d < stride; d += W) store(row + d, Vec{});
  }
}
template <class T, class Out>
void gather(const Unit<T>& u, Out* to, long stride) {
  if (u.args.heads.activation_type == BF16) gather_queries<bf16>(u, to, stride);
  else gather_queries<float>(u, to, stride);
}

template <class Out>
INLINE void write_row(Out* to, const float* from, float factor, long dim) {
  for (long d = 0; d < dim; d += W) store(to + d, load(from + d) * factor);
}
INLINE void write_output(const AttentionArgs& a, int64_t row, int64_t head, const float* from, float factor) {
  const int64_t at = row * a.out_stride + head * a.heads.head_dim;
  if (a.heads.activation_type == BF16) write_row(static_cast<bf16*>(a.out) + at, from, factor, a.heads.head_dim);
  else write_row(static_cast<float*>(a.out) + at, from, factor, a.heads.head_dim);
}

// Normalised rows go to the output where the row has a single partial, else with their LSE to the workspace.
template <class T>
void write_results(const Unit<T>& u, const float* out, long stride, const float* max, const float* sum) {
  const AttentionArgs& a = u.args;
  for (int i = 0; i < u.rows; i++) {
    const int64_t row = u.item[ROW_BEGIN] + i / u.group, head = u.head * u.group + i % u.group;
    const float factor = sum[i] == 0 ? 0.f : 1.f / sum[i];
    if (a.plan.row_flags[row]) {
      write_output(a, row, head, out + i * stride, factor);
    } else {
      const int64_t slot = (u.item[PARTIAL_BASE] + i / u.group) * a.heads.q_heads + head;
      write_row(a.partial_out + slot * u.dim, out + i * stride, factor, u.dim);
      a.partial_lse[slot] = sum[i] == 0 ? -INFINITY : max[i] + std::log2(sum[i]);
    }
  }
}

struct State {
  float *out, *max, *sum;
  long out_stride;
  RowState rows(int first, long dim) const {
    return {max + first, sum + first, out + first * out_stride, out_stride, dim};
  }
};
State fresh_state(Buffers& b, int rows, long dim) {
  const int padded = (rows + BLOCK - 1) / BLOCK * BLOCK;
  State s{b.out.fit(padded * (dim + OUT_PAD)), b.max.fit(padded), b.sum.fit(padded), dim + OUT_PAD};
  std::fill(s.out, s.out + padded * s.out_stride, 0.f);
  std::fill(s.max, s.max + padded, EMPTY_MAX);
  std::fill(s.sum, s.sum + padded, 0.f);
  return s;
}

// ------------------------------------------------------------------------------------------------ vector units
template <class T, long DIM>
void run_vectors(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
  using L = Layout<T>;
  const long dim = DIM ? DIM : u.dim;
  float* q = b.q.fit(u.rows * dim);
  float* scores = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
  const State state = fresh_state(b, u.rows, dim);
  gather(u, q, dim);
  const float scale = u.args.scale * LOG2E;
  Prefetcher ahead;
  for (int g = 0; g < u.steps; g++) {
    const int valid = u.tokens_of(g);
    ahead.clear();
    if (g + 1 < u.steps) u.prefetch(g + 1, ahead);
    else if (next) next->prefetch(0, ahead);
    for (int first = 0; first < u.rows; first += BLOCK) {
      const int rows = std::min(BLOCK, u.rows - first), keys = (valid + 2 * BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK);
      int visible[BLOCK];
      bool cut;
      if (!u.visible(g, first, rows, keys, visible, &cut)) continue;
      for (int j = 0; j < u.chunks_of(g); j++)
        product_blocks<T, false>(rows, std::min(4, (valid - j * CHUNK + BLOCK - 1) / BLOCK), q + first * dim, dim,
                                 u.k(g * STEP_CHUNKS + j), L::k_step(), L::k_block(dim), scores + j * CHUNK, SCORE_STRIDE,
                                 int(dim / STEP<T>), ahead);
      const RowState rs = state.rows(first, dim);
      constexpr Precision P = L::PAIRS ? COARSE : FINE;
      auto nothing = [] {};
      if (cut) online_softmax<true, P>(scores, scores, SCORE_STRIDE, rows, keys, visible, scale, rs, ahead, 1, nothing);
      else online_softmax<false, P>(scores, scores, SCORE_STRIDE, rows, keys, visible, scale, rs, ahead, 1, nothing);
      for (int j = 0; j < u.chunks_of(g); j++) {
        const int n = std::min(CHUNK, valid - j * CHUNK);
        product_blocks<T, true>(rows, int(dim / BLOCK), scores + j * CHUNK, SCORE_STRIDE, u.v(g * STEP_CHUNKS + j), L::v_step(dim),
                                L::v_block(), rs.out, rs.out_stride, (n + STEP<T> - 1) / STEP<T>, ahead);
      }
    }
    ahead.step(int(ahead.lines()));
  }
  write_results(u, state.out, state.out_stride, state.max, state.sum);
}

#if defined(__AMX_TILE__)
// ------------------------------------------------------------------------------------------------ AMX
// One 16-row block in one softmax step.
struct Task {
  int step = 0, block = 0;
};

// Tile products in small portions, so that they can be issued between the rows of another task's softmax: the tile unit
// and the vector units then work at the same time. First p.v of one task, then q.k of another.
class TileWork {
 public:
  void start_pv(const bf16* probs, const bf16* const* v, int chunks, float* out, long out_stride, long dim) {
    probs_ = probs, out_ = out, out_stride_ = out_stride, dim_ = dim;
    for (int j = 0; j < chunks; j++) v_[j] = v[j];
    pv_steps_ = 2 * chunks, k_ = 0, column_ = 0;
    columns_left_ = int(dim / BLOCK);
  }
  void start_qk(const bf16* q, const bf16* const* k, int chunks, float* scores, long k_dim) {
    q_ = q, scores_ = scores, k_dim_ = k_dim;
    for (int j = 0; j < chunks; j++) keys_[j] = k[j];
    chunk_ = 0, dim_at_ = 0;
    chunks_left_ = chunks;
  }
  int portions() const { return (columns_left_ + 3) / 4 * pv_steps_ + chunks_left_ * int(k_dim_ / 32); }
  INLINE void portion() {
    if (columns_left_ >= 4) pv<4>();
    else if (columns_left_) pv<1>();
    else if (chunks_left_) qk();
  }
  void finish() {
    while (columns_left_ || chunks_left_) portion();
  }

 private:
  // 32 keys times N x 16 dimensions.
  template <int N>
  INLINE void pv() {
    float* o = out_ + column_ * BLOCK;
    const long stride = out_stride_ * 4, v_stride = dim_ * 4;
    if (k_ == 0) {
      TILE_LOAD(0, o, stride);
      if (N == 4) { TILE_LOAD(1, o + 16, stride); TILE_LOAD(2, o + 32, stride); TILE_LOAD(3, o + 48, stride); }
    }
    const bf16* v = v_[k_ / 2] + (k_ % 2) * 32 * dim_ + column_ * 2 * BLOCK;
    TILE_LOAD(4, probs_ + k_ * 32, PROB_STRIDE * 2);
    TILE_LOAD(5, v, v_stride);
    TILE_DOT_BF16(0, 4, 5);
    if (N == 4) {
      TILE_LOAD(6, v + 32, v_stride); TILE_DOT_BF16(1, 4, 6);
      TILE_LOAD(7, v + 64, v_stride); TILE_DOT_BF16(2, 4, 7);
      TILE_LOAD(5, v + 96, v_stride); TILE_DOT_BF16(3, 4, 5);
    }
    if (++k_ < pv_steps_) return;
    TILE_STORE(0, o, stride);
    if (N == 4) { TILE_STORE(1, o + 16, stride); TILE_STORE(2, o + 32, stride); TILE_STORE(3, o + 48, stride); }
    k_ = 0, column_ += N, columns_left_ -= N;
  }
  // 32 dimensions times the 64 keys of a chunk.
  INLINE void qk() {
    const bf16* k = keys_[chunk_] + dim_at_ * BLOCK;
    const long block = k_dim_ * BLOCK;
    if (dim_at_ == 0) { TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3); }
    TILE_LOAD(4, q_ + dim_at_, k_dim_ * 2);
    TILE_LOAD(5, k, 64); TILE_DOT_BF16(0, 4, 5);
    TILE_LOAD(6, k + block, 64); TILE_DOT_BF16(1, 4, 6);
    TILE_LOAD(7, k + 2 * block, 64); TILE_DOT_BF16(2, 4, 7);
    TILE_LOAD(5, k + 3 * block, 64); TILE_DOT_BF16(3, 4, 5);
    dim_at_ += 32;
    if (dim_at_ < k_dim_) return;
    float* s = scores_ + chunk_ * CHUNK;
    constexpr long stride = SCORE_STRIDE * 4;
    TILE_STORE(0, s, stride); TILE_STORE(1, s + 16, stride); TILE_STORE(2, s + 32, stride); TILE_STORE(3, s + 48, stride);
    dim_at_ = 0, chunk_++, chunks_left_--;
  }

  const bf16 *probs_ = nullptr, *v_[STEP_CHUNKS] = {}, *q_ = nullptr, *keys_[STEP_CHUNKS] = {};
  float *out_ = nullptr, *scores_ = nullptr;
  long out_stride_ = 0, dim_ = 0, k_dim_ = 0;
  int pv_steps_ = 0, k_ = 0, column_ = 0, columns_left_ = 0;
  int chunk_ = 0, dim_at_ = 0, chunks_left_ = 0;
};

// The first `tokens` of a chunk's V, zeros behind: a probability of 0 does not protect from NaN in stale memory.
const bf16* padded_values(const bf16* v, int tokens, long dim, Buffers& b) {
  bf16* to = b.v_tail.fit(CHUNK * dim);
  const long used = Layout<bf16>::v_used(tokens, dim);
  memcpy(to, v, used * sizeof(bf16));
  memset(to + used, 0, (CHUNK * dim - used) * sizeof(bf16));
  return to;
}

class TileUnit {
 public:
  TileUnit(const Unit<bf16>& u, const Unit<bf16>* next, Buffers& b)
      : u_(u), next_(next), b_(b), k_dim_(Layout<bf16>::k_dim(u.dim)), blocks_((u.rows + BLOCK - 1) / BLOCK) {
    q_ = b.q_pairs.fit(blocks_ * BLOCK * k_dim_);
    scores_ = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
    probs_ = b.probs.fit(2 * BLOCK * PROB_STRIDE);
    state_ = fresh_state(b, u.rows, u.dim);
    gather(u, q_, k_dim_);
    memset(q_ + u.rows * k_dim_, 0, (blocks_ * BLOCK - u.rows) * k_dim_ * sizeof(bf16));
  }

  // Task t's softmax runs together with p.v of task t - 1 and q.k of task t + 1. With a single block p.v of t - 1 must
  // come first: softmax may rescale the very rows it adds to.
  void run() {
    Task task, previous;
    bool more = find_visible(task), started = false;
    TileWork work;
    if (more) {
      start_qk(work, task, 0);
      work.finish();
    }
    for (int t = 0; more; t++) {
      Task following = task;
      advance(following);
      const bool has_following = find_visible(following);
      if (started) start_pv(work, previous, (t - 1) & 1);
      if (blocks_ == 1) work.finish();
      if (has_following) start_qk(work, following, (t + 1) & 1);
      if (task.step != step_) enter(task.step);
      softmax(task, t & 1, work);
      work.finish();
      previous = task, started = true;
      task = following, more = has_following;
      last_ = t & 1;
    }
    if (started) {
      start_pv(work, previous, last_);
      work.finish();
    }
    write_results(u_, state_.out, state_.out_stride, state_.max, state_.sum);
  }

 private:
  int rows_of(int block) const { return std::min(BLOCK, u_.rows - block * BLOCK); }
  void advance(Task& t) const {
    if (++t.block == blocks_) t.block = 0, t.step++;
  }
  // Moves on to the next task whose rows see any key.
  bool find_visible(Task& t) const {
    for (; t.step < u_.steps; advance(t)) {
      if (!u_.masked) return true;
      const int last_row = (t.block * BLOCK + rows_of(t.block) - 1) / u_.group;
      const int position = u_.item[FIRST_POSITION] + t.step * STEP_KEYS;
      if (u_.args.positions[u_.item[ROW_BEGIN] + last_row] >= position) return true;
    }
    return false;
  }
  // Paces the prefetch of the next step (or unit) over this one: 60% through the softmax, the rest between portions.
  void enter(int step) {
    ahead_.step(int(ahead_.lines()));
    ahead_.clear();
    if (step + 1 < u_.steps) u_.prefetch(step + 1, ahead_);
    else if (next_) next_->prefetch(0, ahead_);
    step_ = step;
    const int ticks = u_.rows * u_.chunks_of(step) * CHUNK / (2 * W);
    lines_ = int(ahead_.lines() * 6 / 10 / ticks) + 1;
    portion_lines_ = int(ahead_.lines() / (8 * blocks_)) + 1;
  }
  void start_qk(TileWork& work, Task t, int buffer) {
    const bf16* k[STEP_CHUNKS];
    const int chunks = u_.chunks_of(t.step);
    for (int j = 0; j < chunks; j++) k[j] = u_.k(t.step * STEP_CHUNKS + j);
    work.start_qk(q_ + t.block * BLOCK * k_dim_, k, chunks, scores_ + buffer * BLOCK * SCORE_STRIDE, k_dim_);
  }
  void start_pv(TileWork& work, Task t, int buffer) {
    const bf16* v[STEP_CHUNKS];
    const int chunks = u_.chunks_of(t.step), valid = u_.tokens_of(t.step);
    for (int j = 0; j < chunks; j++) v[j] = u_.v(t.step * STEP_CHUNKS + j);
    if (valid < chunks * CHUNK) {
      if (!v_tail_) v_tail_ = padded_values(v[chunks - 1], valid - (chunks - 1) * CHUNK, u_.dim, b_);
      v[chunks - 1] = v_tail_;
    }
    const RowState rows = state_.rows(t.block * BLOCK, u_.dim);
    work.start_pv(probs_ + buffer * BLOCK * PROB_STRIDE, v, chunks, rows.out, rows.out_stride, u_.dim);
  }
  void softmax(Task t, int buffer, TileWork& work) {
    const int rows = rows_of(t.block), keys = u_.chunks_of(t.step) * CHUNK;
    float* scores = scores_ + buffer * BLOCK * SCORE_STRIDE;
    bf16* probs = probs_ + buffer * BLOCK * PROB_STRIDE;
    const float scale = u_.args.scale * LOG2E;
    int visible[BLOCK];
    bool cut;
    u_.visible(t.step, t.block * BLOCK, rows, keys, visible, &cut);
    const RowState state = state_.rows(t.block * BLOCK, u_.dim);
    const int per_row = (work.portions() + rows - 1) / rows;
    auto overlap = [&] {
      for (int i = 0; i < per_row; i++) work.portion();
      ahead_.step(portion_lines_);
    };
    if (cut) online_softmax<true, COARSE>(scores, probs, PROB_STRIDE, rows, keys, visible, scale, state, ahead_, lines_, overlap);
    else online_softmax<false, COARSE>(scores, probs, PROB_STRIDE, rows, keys, visible, scale, state, ahead_, lines_, overlap);
  }

  const Unit<bf16>& u_;
  const Unit<bf16>* next_;
  Buffers& b_;
  long k_dim_;
  int blocks_, step_ = -1, lines_ = 0, portion_lines_ = 0, last_ = 0;
  bf16 *q_, *probs_;
  float* scores_;
  const bf16* v_tail_ = nullptr;
  State state_;
  Prefetcher ahead_;
};
#endif

template <class T>
void run_unit(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
#if defined(__AMX_TILE__)
  if constexpr (Layout<T>::PAIRS) {
    if (u.rows > u.args.vector_rows) {
      TileUnit(u, next, b).run();
      return;
    }
  }
#endif
  switch (u.dim) {
    case 64: run_vectors<T, 64>(u, next, b); break;
    case 128: run_vectors<T, 128>(u, next, b); break;
    default: run_vectors<T, 0>(u, next, b);
  }
}

template <class T>
void run_units(const AttentionArgs& args, Counter& next, Buffers& b) {
  const int64_t units = args.plan.num_items * args.heads.kv_heads;
  int64_t index = next.take();
  while (index < units) {
    const int64_t following = next.take();  // one ahead, so that prefetching runs on into it
    const Unit<T> unit(args, index);
    if (following < units) {
      const Unit<T> after(args, following);
      run_unit(unit, &after, b);
    } else {
      run_unit<T>(unit, nullptr, b);
    }
    index = following;
  }
}

}  // namespace

void attention_units(const AttentionArgs& args, Counter& next) {
  static thread_local Buffers buffers;
  [[maybe_unused]] Tiles tiles;
  if (args.heads.kv_type == BF16) run_units<bf16>(args, next, buffers);
  else run_units<float>(args, next, buffers);
}

void merge_partials(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.heads.q_heads, dim = a.heads.head_dim;
  alignas(64) float joined[256];
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / heads, head = i % heads;
    if (a.plan.row_flags[row]) continue;
    const int32_t *slot = a.plan.merge_slots + a.plan.merge_indptr[row], *last = a.plan.merge_slots + a.plan.merge_indptr[row + 1];
    float top = -INFINITY, total = 0;
    for (const int32_t* s = slot; s < last; s++) {
      const float lse = a.partial_lse[*s * heads + head];
      if (!(lse <= top)) top = lse;  // so that NaN, too, makes the row visible
    }
    std::fill(joined, joined + dim, 0.f);
    for (; slot < last && top != -INFINITY; slot++) {
      const int64_t at = *slot * heads + head;
      const float weight = ::exp2f(a.partial_lse[at] - top);
      if (weight == 0) continue;
      total += weight;
      for (int64_t d = 0; d < dim; d += W) store(joined + d, load(joined + d) + load(a.partial_out + at * dim + d) * weight);
    }
    write_output(a, row, head, joined, total == 0 ? 0.f : 1.f / total);
  }
}

}  // namespace chunkllama
