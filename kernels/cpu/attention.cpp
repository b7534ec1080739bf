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
  Scratch<float> q, out, reference, sum, scores, float_probs;
  Scratch<bf16> q_pairs, probs, v_tail;
};

// Out of line, so that the loops around its call keep their registers.
__attribute__((noinline)) void bend(int rows, int keys, float factor, float* scores) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < keys; j += W) {
      float* at = scores + r * SCORE_STRIDE + j;
      store(at, tanh(load(at) * factor));
    }
}

// One item for one kv head: `rows` query rows, row i being head i % group of token row i / group.
template <class T>
struct Unit {
  Unit(const AttentionArgs& a, int64_t index)
      : args(a),
        item(a.plan.items + index / a.heads.kv_heads * ITEM_COLUMNS),
        head(index % a.heads.kv_heads) {
    group = int(a.heads.q_heads / a.heads.kv_heads);
    rows = item[NUM_ROWS] * group;
    dim = a.heads.head_dim;
    masked = item[FLAGS] & ITEM_MASK;
    windowed = item[FLAGS] & ITEM_WINDOW;
    tokens = item[NUM_TOKENS];
    if (masked)
      tokens = std::min(
          tokens, a.positions[item[ROW_BEGIN] + item[NUM_ROWS] - 1] + 1 - item[FIRST_POSITION]);
    tokens = std::max(tokens, 0);
    chunks = (tokens + CHUNK - 1) / CHUNK;
    steps = (chunks + STEP_CHUNKS - 1) / STEP_CHUNKS;
  }

  const T* chunk(int i) const {
    return static_cast<const T*>(args.kv) +
           args.plan.chunk_ids[item[CHUNK_OFFSET] + i] * Layout<T>::chunk(args.heads.kv_heads, dim);
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

  // Keys of the step that each of the rows [first, first + count) sees; false if none of them sees
  // any. `cut` tells whether some row does not see all `keys` columns of the scores.
  bool visible(int step, int first, int count, int keys, int* out, bool* cut) const {
    const int valid = tokens_of(step), position = item[FIRST_POSITION] + step * STEP_KEYS;
    if (!masked) {
      std::fill_n(out, count, valid);
      *cut = valid < keys;
      return true;
    }
    int least = valid, most = 0;
    for (int r = 0; r < count; r++) {
      out[r] =
          std::min(valid, args.positions[item[ROW_BEGIN] + (first + r) / group] + 1 - position);
      least = std::min(least, out[r]);
      most = std::max(most, out[r]);
    }
    *cut = least < keys;
    return most > 0;
  }

  // Hides the keys before the window of each of the rows [first, first + count): their scores
  // become -inf.
  void hide_before_window(int step, int first, int count, int keys, float* scores) const {
    if (!windowed) return;
    const int64_t position = item[FIRST_POSITION] + step * STEP_KEYS;
    for (int r = 0; r < count; r++) {
      const int64_t own = args.positions[item[ROW_BEGIN] + (first + r) / group];
      const int64_t hidden = std::min<int64_t>(own + 1 - args.plan.window - position, keys);
      if (hidden > 0) std::fill_n(scores + r * SCORE_STRIDE, hidden, -INFINITY);
    }
  }

  // Scores [count, keys] become tanh(score * tanh_scale) in models with a soft cap.
  void cap(int count, int keys, float* scores) const {
    if (args.tanh_scale != 0) bend(count, keys, args.tanh_scale, scores);
  }

  const AttentionArgs& args;
  const int32_t* item;
  int64_t head;
  long dim;
  int group, rows, tokens, chunks, steps;
  bool masked, windowed;
};

template <class Q, class T, class Out>
void gather_queries(const Unit<T>& u, Out* to, long stride) {
  const Q* q = static_cast<const Q*>(u.args.q);
  for (int i = 0; i < u.rows; i++) {
    const Q* from = q + (u.item[ROW_BEGIN] + i / u.group) * u.args.q_stride +
                    (u.head * u.group + i % u.group) * u.dim;
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
INLINE void write_output(const AttentionArgs& a, int64_t row, int64_t head, const float* from,
                         float factor) {
  const int64_t at = row * a.out_stride + head * a.heads.head_dim;
  if (a.heads.activation_type == BF16)
    write_row(static_cast<bf16*>(a.out) + at, from, factor, a.heads.head_dim);
  else write_row(static_cast<float*>(a.out) + at, from, factor, a.heads.head_dim);
}

RowState fresh_state(Buffers& b, int rows, long dim) {
  const RowState s{b.reference.fit(rows), b.sum.fit(rows * W), b.out.fit(rows * (dim + OUT_PAD)),
                   dim + OUT_PAD, dim};
  std::fill_n(s.reference, rows, NO_REFERENCE);
  std::fill_n(s.sum, rows * W, 0.f);
  std::fill_n(s.out, rows * s.out_stride, 0.f);
  return s;
}

// Normalised rows go to the output where the row has a single partial, else with their LSE to the
// workspace.
template <class T>
void write_results(const Unit<T>& u, const RowState& state) {
  const AttentionArgs& a = u.args;
  for (int i = 0; i < u.rows; i++) {
    const int64_t row = u.item[ROW_BEGIN] + i / u.group, head = u.head * u.group + i % u.group;
    const float total = sum(load(state.sum + i * W)), factor = total == 0 ? 0.f : 1.f / total;
    const float* from = state.out + i * state.out_stride;
    if (a.plan.row_flags[row]) {
      write_output(a, row, head, from, factor);
    } else {
      const int64_t slot = (u.item[PARTIAL_BASE] + i / u.group) * a.heads.q_heads + head;
      write_row(a.partial_out + slot * u.dim, from, factor, u.dim);
      a.partial_lse[slot] = total == 0 ? -INFINITY : state.reference[i] + std::log2(total);
    }
  }
}

// Vector units.

// Type of queries and probabilities: bf16 where an instruction multiplies pairs of it. CPUs with
// AMX start one vdpbf16ps every second cycle, so it is no faster than two multiply-adds there, and
// rounding to bf16 comes on top.
#if defined(BF16_PRODUCTS) && !defined(__AMX_TILE__)
template <class T>
using Operand = T;
#else
template <class T>
using Operand = float;
#endif

// The queries of a unit, one row behind the other, and room for the probabilities of BLOCK rows.
INLINE float* operands(Buffers& b, long queries, float** probs) {
  *probs = b.float_probs.fit(BLOCK * PROB_STRIDE);
  return b.q.fit(queries);
}
INLINE bf16* operands(Buffers& b, long queries, bf16** probs) {
  *probs = b.probs.fit(2 * BLOCK * PROB_STRIDE);
  return b.q_pairs.fit(queries);
}

template <class T, long DIM>
void run_vectors(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
  using L = Layout<T>;
  const long dim = DIM ? DIM : u.dim;
  float* scores = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
  Operand<T>* probs;
  Operand<T>* q = operands(b, u.rows * dim, &probs);
  const RowState state = fresh_state(b, u.rows, dim);
  gather(u, q, dim);
  const float scale = u.args.scale * LOG2E;
  Prefetcher ahead;
  for (int g = 0; g < u.steps; g++) {
    const int valid = u.tokens_of(g);
    ahead.clear();
    ahead.pace();
    if (g + 1 < u.steps) u.prefetch(g + 1, ahead);
    else if (next) next->prefetch(0, ahead);
    for (int first = 0; first < u.rows; first += BLOCK) {
      const int rows = std::min(BLOCK, u.rows - first),
                keys = (valid + 2 * BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK);
      int visible[BLOCK];
      bool cut;
      if (!u.visible(g, first, rows, keys, visible, &cut)) continue;
      for (int j = 0; j < u.chunks_of(g); j++)
        product_blocks<T, false>(rows, std::min(4, (valid - j * CHUNK + BLOCK - 1) / BLOCK),
                                 q + first * dim, dim, u.k(g * STEP_CHUNKS + j), L::k_step(),
                                 L::k_block(dim), scores + j * CHUNK, SCORE_STRIDE,
                                 int(dim / STEP<T>), ahead);
      u.cap(rows, keys, scores);
      u.hide_before_window(g, first, rows, keys, scores);
      const RowState rs = state.from(first);
      constexpr Precision P = L::PAIRS ? COARSE : FINE;
      if (cut)
        online_softmax<true, P>(scores, probs, PROB_STRIDE, rows, keys, visible, scale, rs, ahead);
      else
        online_softmax<false, P>(scores, probs, PROB_STRIDE, rows, keys, visible, scale, rs, ahead);
      for (int j = 0; j < u.chunks_of(g); j++) {
        const int n = std::min(CHUNK, valid - j * CHUNK);
        product_blocks<T, true>(rows, int(dim / BLOCK), probs + j * CHUNK, PROB_STRIDE,
                                u.v(g * STEP_CHUNKS + j), L::v_step(dim), L::v_block(), rs.out,
                                rs.out_stride, (n + STEP<T> - 1) / STEP<T>, ahead);
      }
    }
    ahead.finish();
  }
  write_results(u, state);
}

#if defined(__AMX_TILE__)
// AMX.

// Four tile dots take about as long as 192 keys of a row's softmax.
constexpr int TILE_PLACES = 6;

// scores [16 * ROW_TILES, 64] = q * the 64 keys of a chunk.
template <int ROW_TILES>
INLINE void tile_scores(const bf16* q, const bf16* k, long k_dim, float* scores,
                        Prefetcher& ahead) {
  constexpr int COLUMNS = 4 / ROW_TILES;
  using Scores = TileSum<ROW_TILES, COLUMNS>;
  const long block = k_dim * BLOCK;
  for (int key = 0; key < CHUNK; key += COLUMNS * BLOCK, k += COLUMNS * block) {
    Scores::zero();
    for (long d = 0; d < k_dim; d += 32) {
      Scores::template add_product<KEEP, STREAM>(q + d, k_dim * 2, block * 2, k + d * BLOCK, 64,
                                                 block * 2);
      ahead.step(TILE_PLACES);
    }
    Scores::store(scores + key, SCORE_STRIDE);
  }
}

// out [16 * ROW_TILES, 16 * COLUMNS] += probs * V of the step's chunks.
template <int ROW_TILES, int COLUMNS>
INLINE void tile_values(const bf16* probs, const bf16* const* v, int chunks, long column, long dim,
                        float* out, long out_stride, Prefetcher& ahead) {
  using Out = TileSum<ROW_TILES, COLUMNS>;
  Out::load(out + column, out_stride);
  for (int k = 0; k < 2 * chunks; k++, probs += 32) {
    const bf16* values = v[k / 2] + k % 2 * 32 * dim + column * 2;
    Out::template add_product<KEEP, STREAM>(probs, PROB_STRIDE * 2, BLOCK * PROB_STRIDE * 2, values,
                                            dim * 4, 64);
    ahead.step(TILE_PLACES);
  }
  Out::store(out + column, out_stride);
}

// The first `tokens` of a chunk's V followed by zeros: a probability of 0 times a NaN in stale
// memory would be NaN.
const bf16* padded_values(const bf16* v, int tokens, long dim, Buffers& b) {
  bf16* to = b.v_tail.fit(CHUNK * dim);
  const long used = Layout<bf16>::v_used(tokens, dim);
  memcpy(to, v, used * sizeof(bf16));
  memset(to + used, 0, (CHUNK * dim - used) * sizeof(bf16));
  return to;
}

// Up to 32 rows of a unit in one softmax step: scores, softmax, output.
template <int ROW_TILES>
void tile_step(const Unit<bf16>& u, int step, int first, const bf16* const* v, const bf16* q,
               float* scores, bf16* probs, const RowState& state, Prefetcher& ahead) {
  const int chunks = u.chunks_of(step), keys = chunks * CHUNK,
            rows = std::min(ROW_TILES * BLOCK, u.rows - first);
  const long dim = u.dim, k_dim = Layout<bf16>::k_dim(dim);
  const float scale = u.args.scale * LOG2E;
  int visible[2 * BLOCK];
  bool cut;
  if (!u.visible(step, first, rows, keys, visible, &cut)) return;
  for (int j = 0; j < chunks; j++)
    tile_scores<ROW_TILES>(q + first * k_dim, u.k(step * STEP_CHUNKS + j), k_dim,
                           scores + j * CHUNK, ahead);
  u.cap(rows, keys, scores);
  u.hide_before_window(step, first, rows, keys, scores);
  for (int r = 0; r < rows; r += BLOCK) {
    const int n = std::min(BLOCK, rows - r);
    float* s = scores + r * SCORE_STRIDE;
    bf16* p = probs + r * PROB_STRIDE;
    const RowState block = state.from(first + r);
    if (cut)
      online_softmax<true, COARSE>(s, p, PROB_STRIDE, n, keys, visible + r, scale, block, ahead);
    else
      online_softmax<false, COARSE>(s, p, PROB_STRIDE, n, keys, visible + r, scale, block, ahead);
  }
  const RowState block = state.from(first);
  constexpr int COLUMNS = 4 / ROW_TILES;
  long column = 0;
  for (; column + COLUMNS * BLOCK <= dim; column += COLUMNS * BLOCK)
    tile_values<ROW_TILES, COLUMNS>(probs, v, chunks, column, dim, block.out, block.out_stride,
                                    ahead);
  for (; column < dim; column += BLOCK)
    tile_values<ROW_TILES, 1>(probs, v, chunks, column, dim, block.out, block.out_stride, ahead);
}

void run_tiles(const Unit<bf16>& u, const Unit<bf16>* next, Buffers& b) {
  const long k_dim = Layout<bf16>::k_dim(u.dim);
  const int padded = (u.rows + BLOCK - 1) / BLOCK * BLOCK;
  bf16* q = b.q_pairs.fit(padded * k_dim);
  float* scores = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
  bf16* probs = b.probs.fit(2 * BLOCK * PROB_STRIDE);
  const RowState state = fresh_state(b, padded, u.dim);
  gather(u, q, k_dim);
  memset(q + u.rows * k_dim, 0, (padded - u.rows) * k_dim * sizeof(bf16));
  Prefetcher ahead;
  for (int g = 0; g < u.steps; g++) {
    const int chunks = u.chunks_of(g), valid = u.tokens_of(g);
    const bf16* v[STEP_CHUNKS];
    for (int j = 0; j < chunks; j++) v[j] = u.v(g * STEP_CHUNKS + j);
    if (valid < chunks * CHUNK)
      v[chunks - 1] = padded_values(v[chunks - 1], valid - (chunks - 1) * CHUNK, u.dim, b);
    ahead.clear();
    if (g + 1 < u.steps) u.prefetch(g + 1, ahead);
    else if (next) next->prefetch(0, ahead);
    ahead.spread(chunks * (u.rows * CHUNK / (2 * W) +
                           padded / BLOCK * int(k_dim + u.dim) / 32 * TILE_PLACES));
    for (int first = 0; first < u.rows; first += 2 * BLOCK) {
      if (u.rows - first > BLOCK) tile_step<2>(u, g, first, v, q, scores, probs, state, ahead);
      else tile_step<1>(u, g, first, v, q, scores, probs, state, ahead);
    }
    ahead.finish();
  }
  write_results(u, state);
}
#endif

template <class T>
void run_unit(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
#if defined(__AMX_TILE__)
  if constexpr (Layout<T>::PAIRS) {
    if (u.rows > u.args.vector_rows) {
      run_tiles(u, next, b);
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
void run_units(const AttentionArgs& args, Phase& phase, int64_t units, Buffers& b) {
  int64_t index = phase.take();
  while (index < units) {
    const int64_t following = phase.take();  // one ahead: its first step is prefetched
    const Unit<T> unit(args, index);
    if (following < units) {
      const Unit<T> after(args, following);
      run_unit(unit, &after, b);
    } else {
      run_unit<T>(unit, nullptr, b);
    }
    phase.finish();
    index = following;
  }
}

}  // namespace

void attention_units(const AttentionArgs& args, Phase& phase) {
  static thread_local Buffers buffers;
  const int64_t units = args.plan.num_items * args.heads.kv_heads;
  {
    [[maybe_unused]] Tiles tiles;
    if (args.heads.kv_type == BF16) run_units<bf16>(args, phase, units, buffers);
    else run_units<float>(args, phase, units, buffers);
  }
  phase.wait(units);
}

void merge_partials(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.heads.q_heads, dim = a.heads.head_dim;
  alignas(64) float joined[256];
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / heads, head = i % heads;
    if (a.plan.row_flags[row]) continue;
    const int32_t *slot = a.plan.merge_slots + a.plan.merge_indptr[row],
                  *last = a.plan.merge_slots + a.plan.merge_indptr[row + 1];
    float top = -INFINITY, total = 0;
    for (const int32_t* s = slot; s < last; s++) {
      const float lse = a.partial_lse[*s * heads + head];
      if (!(lse <= top)) top = lse;  // NaN is kept, too
    }
    std::fill(joined, joined + dim, 0.f);
    for (; slot < last && top != -INFINITY; slot++) {
      const int64_t at = *slot * heads + head;
      const float weight = ::exp2f(a.partial_lse[at] - top);
      if (weight == 0) continue;
      total += weight;
      for (int64_t d = 0; d < dim; d += W)
        store(joined + d, load(joined + d) + load(a.partial_out + at * dim + d) * weight);
    }
    write_output(a, row, head, joined, total == 0 ? 0.f : 1.f / total);
  }
}

}  // namespace chunkllama
