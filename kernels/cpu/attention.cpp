#include "attention.h"

#include <algorithm>
#include <cmath>

#include "attention_unit.h"
#include "micro.h"
#include "tiles.h"

namespace chunkllama {
namespace {

constexpr float LOG2E = 1.44269504f;

// Vector units.

// Type of queries and probabilities: bf16 where an instruction multiplies pairs of it. CPUs with
// AMX start one vdpbf16ps every second cycle, so it is no faster than two multiply-adds there, and
// rounding to bf16 comes on top.
#if defined(BF16_PRODUCTS) && !defined(__AMX_TILE__)
template <class T>
using Operand = std::conditional_t<Layout<T>::PAIRS, bf16, float>;
#else
template <class T>
using Operand = float;
#endif

// Of the probabilities: the rounding of bf16 and int8 hides a coarser one.
template <class T>
constexpr Precision PRECISION = std::is_same_v<T, float> ? FINE : COARSE;

// The queries of a unit, one row behind the other, and room for the probabilities of BLOCK rows.
INLINE float* operands(Buffers& b, long queries, float** probs) {
  *probs = b.float_probs.fit(BLOCK * PROB_STRIDE);
  return b.q.fit(queries);
}
INLINE bf16* operands(Buffers& b, long queries, bf16** probs) {
  *probs = b.probs.fit(2 * BLOCK * PROB_STRIDE);
  return b.q_pairs.fit(queries);
}

// Places of a step of run_vectors: those of both products and of the softmax.
template <class T>
INLINE int places_of(const Unit<T>& u, int step, long dim) {
  const int groups = u.rows / BLOCK * ((BLOCK + MAX_ROWS - 1) / MAX_ROWS) +
                     (u.rows % BLOCK + MAX_ROWS - 1) / MAX_ROWS;
  return u.chunks_of(step) * (groups * 2 * int(dim / STEP<T>) * (CHUNK / BLOCK) +
                              u.rows * CHUNK / (2 * W));
}

template <class T, long DIM>
void run_vectors(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
  using L = Layout<T>;
  const long dim = DIM ? DIM : u.dim;
  float* scores = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
  Operand<T>* probs;
  Operand<T>* q = operands(b, u.rows * dim, &probs);
  const RowState state = fresh_state(u, b, u.rows);
  gather(u, q, dim);
  const float scale = u.args.scale * LOG2E;
  Prefetcher ahead;
  for (int g = 0; g < u.steps; g++) {
    const int valid = u.tokens_of(g);
    const StepScales scales = u.widen_scales(g, b);
    ahead.clear();
    if (g + 1 < u.steps) u.prefetch(g + 1, ahead);
    else if (next) next->prefetch(0, ahead);
    ahead.spread(places_of(u, g, dim));
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
      u.scale_scores(rows, keys, scales, scores);
      u.cap(rows, keys, scores);
      u.hide_before_window(g, first, rows, keys, scores);
      const RowState rs = state.from(first);
      if (cut)
        online_softmax<true, L::SCALED, PRECISION<T>>(scores, probs, PROB_STRIDE, rows, keys,
                                                      visible, scales.values, scale, rs, ahead);
      else
        online_softmax<false, L::SCALED, PRECISION<T>>(scores, probs, PROB_STRIDE, rows, keys,
                                                       visible, scales.values, scale, rs, ahead);
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

// Codes of 32 neighbours at a distance of 16 as pairs of bf16, which holds them exactly.
INLINE void widen_pairs(const int8_t* first, const int8_t* second, bf16* to) {
  const IntVec low = (IntVec)load(first), high = (IntVec)load(second);
  const IntVec pairs = (low >> 16 & 0xffff) | (high & set((int32_t)0xffff0000));
  memcpy(to, &pairs, sizeof pairs);
}

// A chunk's K in the order of bf16's; dimensions beyond `dim` are zero.
const bf16* widen_keys(const int8_t* k, long dim, bf16* to) {
  const long k_dim = Layout<bf16>::k_dim(dim);
  for (int block = 0; block < CHUNK / BLOCK; block++, to += BLOCK * k_dim) {
    for (long d = 0; d < dim; d += 2, k += 2 * BLOCK) widen_pairs(k, k + BLOCK, to + d * BLOCK);
    memset(to + dim * BLOCK, 0, (k_dim - dim) * BLOCK * sizeof(bf16));
  }
  return to - CHUNK * k_dim;
}
// A chunk's V in the order of bf16's: any code behind the last token is finite.
const bf16* widen_values(const int8_t* v, long dim, bf16* to) {
  for (int t = 0; t < CHUNK; t += 2, v += 2 * dim, to += 2 * dim)
    for (long d = 0; d < dim; d += BLOCK) widen_pairs(v + d, v + dim + d, to + 2 * d);
  return to - CHUNK * dim;
}

// What all rows of a unit multiply in one softmax step.
struct TileStep {
  const bf16 *k[STEP_CHUNKS], *v[STEP_CHUNKS];
  StepScales scales;
};

TileStep tiles_of(const Unit<bf16>& u, int step, Buffers& b) {
  TileStep s;
  const int chunks = u.chunks_of(step), valid = u.tokens_of(step);
  for (int j = 0; j < chunks; j++) {
    s.k[j] = u.k(step * STEP_CHUNKS + j);
    s.v[j] = u.v(step * STEP_CHUNKS + j);
  }
  if (valid < chunks * CHUNK)
    s.v[chunks - 1] = padded_values(s.v[chunks - 1], valid - (chunks - 1) * CHUNK, u.dim, b);
  return s;
}
// Widened once for all rows; the scales wait for the scores and the probabilities.
TileStep tiles_of(const Unit<int8_t>& u, int step, Buffers& b) {
  TileStep s;
  const long k_elements = Layout<bf16>::k_elements(u.dim), v_elements = CHUNK * u.dim;
  bf16 *k = b.k_wide.fit(STEP_CHUNKS * k_elements), *v = b.v_wide.fit(STEP_CHUNKS * v_elements);
  for (int j = 0; j < u.chunks_of(step); j++) {
    s.k[j] = widen_keys(u.k(step * STEP_CHUNKS + j), u.dim, k + j * k_elements);
    s.v[j] = widen_values(u.v(step * STEP_CHUNKS + j), u.dim, v + j * v_elements);
  }
  s.scales = u.widen_scales(step, b);
  return s;
}

// Up to 32 rows of a unit in one softmax step: scores, softmax, output.
template <int ROW_TILES, class T>
void tile_step(const Unit<T>& u, int step, int first, const TileStep& tiles, const bf16* q,
               float* scores, bf16* probs, const RowState& state, Prefetcher& ahead) {
  const int chunks = u.chunks_of(step), keys = chunks * CHUNK,
            rows = std::min(ROW_TILES * BLOCK, u.rows - first);
  const long dim = u.dim, k_dim = Layout<bf16>::k_dim(dim);
  const float scale = u.args.scale * LOG2E;
  int visible[2 * BLOCK];
  bool cut;
  if (!u.visible(step, first, rows, keys, visible, &cut)) return;
  for (int j = 0; j < chunks; j++)
    tile_scores<ROW_TILES>(q + first * k_dim, tiles.k[j], k_dim, scores + j * CHUNK, ahead);
  u.scale_scores(rows, keys, tiles.scales, scores);
  u.cap(rows, keys, scores);
  u.hide_before_window(step, first, rows, keys, scores);
  for (int r = 0; r < rows; r += BLOCK) {
    const int n = std::min(BLOCK, rows - r);
    float* s = scores + r * SCORE_STRIDE;
    bf16* p = probs + r * PROB_STRIDE;
    const RowState block = state.from(first + r);
    constexpr bool SCALED = Layout<T>::SCALED;
    const float* factors = tiles.scales.values;
    if (cut)
      online_softmax<true, SCALED, COARSE>(s, p, PROB_STRIDE, n, keys, visible + r, factors, scale,
                                           block, ahead);
    else
      online_softmax<false, SCALED, COARSE>(s, p, PROB_STRIDE, n, keys, visible + r, factors, scale,
                                            block, ahead);
  }
  const RowState block = state.from(first);
  constexpr int COLUMNS = 4 / ROW_TILES;
  long column = 0;
  for (; column + COLUMNS * BLOCK <= dim; column += COLUMNS * BLOCK)
    tile_values<ROW_TILES, COLUMNS>(probs, tiles.v, chunks, column, dim, block.out,
                                    block.out_stride, ahead);
  for (; column < dim; column += BLOCK)
    tile_values<ROW_TILES, 1>(probs, tiles.v, chunks, column, dim, block.out, block.out_stride,
                              ahead);
}

template <class T>
void run_tiles(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
  const long k_dim = Layout<bf16>::k_dim(u.dim);
  const int padded = (u.rows + BLOCK - 1) / BLOCK * BLOCK;
  bf16* q = b.q_pairs.fit(padded * k_dim);
  float* scores = b.scores.fit(2 * BLOCK * SCORE_STRIDE);
  bf16* probs = b.probs.fit(2 * BLOCK * PROB_STRIDE);
  const RowState state = fresh_state(u, b, padded);
  gather(u, q, k_dim);
  memset(q + u.rows * k_dim, 0, (padded - u.rows) * k_dim * sizeof(bf16));
  Prefetcher ahead;
  for (int g = 0; g < u.steps; g++) {
    const TileStep tiles = tiles_of(u, g, b);
    ahead.clear();
    if (g + 1 < u.steps) u.prefetch(g + 1, ahead);
    else if (next) next->prefetch(0, ahead);
    ahead.spread(u.chunks_of(g) * (u.rows * CHUNK / (2 * W) +
                           padded / BLOCK * int(k_dim + u.dim) / 32 * TILE_PLACES));
    for (int first = 0; first < u.rows; first += 2 * BLOCK) {
      if (u.rows - first > BLOCK) tile_step<2>(u, g, first, tiles, q, scores, probs, state, ahead);
      else tile_step<1>(u, g, first, tiles, q, scores, probs, state, ahead);
    }
    ahead.finish();
  }
  write_results(u, state);
}
#endif

template <class T>
void run_unit(const Unit<T>& u, const Unit<T>* next, Buffers& b) {
#if defined(__AMX_TILE__)
  if constexpr (!std::is_same_v<T, float>) {
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
    switch (args.heads.kv_type) {
      case BF16: run_units<bf16>(args, phase, units, buffers); break;
      case INT8: run_units<int8_t>(args, phase, units, buffers); break;
      default: run_units<float>(args, phase, units, buffers);
    }
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
