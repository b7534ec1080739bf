// A unit of attention, one item of the plan for one kv head: what it reads, what each of its rows
// sees, and where its results go.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "layout.h"
#include "prefetch.h"
#include "scratch.h"
#include "softmax.h"

namespace chunkllama {

struct Buffers {
  Scratch<float> q, out, reference, sum, scores, float_probs, scales;
  Scratch<bf16> q_pairs, probs, v_tail, k_wide, v_wide;
};

// Out of line, so that the loops around its call keep their registers.
static __attribute__((noinline)) void bend(int rows, int keys, float factor, float* scores) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < keys; j += W) {
      float* at = scores + r * SCORE_STRIDE + j;
      store(at, tanh(load(at) * factor));
    }
}

// Of the keys and of the values of a step, STEP_KEYS each; null where the pool holds no scales.
struct StepScales {
  const float *keys = nullptr, *values = nullptr;
};

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
  // The scales of the chunk's K, then those of its V.
  const bf16* scales(int i) const {
    return reinterpret_cast<const bf16*>(
        chunk(i) + Layout<T>::scale_offset(head, args.heads.kv_heads, dim));
  }
  int chunks_of(int step) const { return std::min(STEP_CHUNKS, chunks - step * STEP_CHUNKS); }
  int tokens_of(int step) const { return std::min(STEP_KEYS, tokens - step * STEP_KEYS); }

  void prefetch(int step, Prefetcher& ahead) const {
    if (step >= steps) return;
    for (int j = 0; j < chunks_of(step); j++) {
      const int n = std::min(CHUNK, tokens_of(step) - j * CHUNK), i = step * STEP_CHUNKS + j;
      ahead.add(k(i), Layout<T>::k_used(n, dim) * sizeof(T));
      ahead.add(v(i), Layout<T>::v_used(n, dim) * sizeof(T));
      ahead.add(scales(i), Layout<T>::scale_elements());
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

  // Behind the last token scales are zero: stale memory may hold NaN.
  StepScales widen_scales(int step, Buffers& b) const {
    if constexpr (!Layout<T>::SCALED) return {};
    float* to = b.scales.fit(2 * STEP_KEYS);
    for (int j = 0; j < chunks_of(step); j++) {
      const bf16* from = scales(step * STEP_CHUNKS + j);
      const int valid = tokens_of(step) - j * CHUNK;
      for (int part = 0; part < 2; part++)
        for (int t = 0; t < CHUNK; t += W)
          store(to + part * STEP_KEYS + j * CHUNK + t,
                first_lanes(valid - t, load(from + part * CHUNK + t), Vec{}));
    }
    return {to, to + STEP_KEYS};
  }

  // Scores [count, keys] of codes become those of keys.
  void scale_scores(int count, int keys, const StepScales& scales, float* scores) const {
    if constexpr (Layout<T>::SCALED)
      for (int r = 0; r < count; r++)
        for (int j = 0; j < keys; j += W) {
          float* at = scores + r * SCORE_STRIDE + j;
          store(at, load(at) * load(scales.keys + j));
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
static void gather_queries(const Unit<T>& u, Out* to, long stride) {
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
static void gather(const Unit<T>& u, Out* to, long stride) {
  if (u.args.heads.activation_type == BF16) gather_queries<bf16>(u, to, stride);
  else gather_queries<float>(u, to, stride);
}

template <class Out>
static INLINE void write_row(Out* to, const float* from, float factor, long dim) {
  for (long d = 0; d < dim; d += W) store(to + d, load(from + d) * factor);
}
static INLINE void write_output(const AttentionArgs& a, int64_t row, int64_t head,
                                const float* from, float factor) {
  const int64_t at = row * a.out_stride + head * a.heads.head_dim;
  if (a.heads.activation_type == BF16)
    write_row(static_cast<bf16*>(a.out) + at, from, factor, a.heads.head_dim);
  else write_row(static_cast<float*>(a.out) + at, from, factor, a.heads.head_dim);
}

template <class T>
static RowState fresh_state(const Unit<T>& u, Buffers& b, int rows) {
  const long dim = u.dim;
  const RowState s{b.reference.fit(rows),
                   b.sum.fit(rows * W),
                   b.out.fit(rows * (dim + OUT_PAD)),
                   dim + OUT_PAD,
                   dim,
                   u.args.independent_rows != 0};
  std::fill_n(s.reference, rows, NO_REFERENCE);
  std::fill_n(s.sum, rows * W, 0.f);
  std::fill_n(s.out, rows * s.out_stride, 0.f);
  return s;
}

// Normalised rows go to the output where the row has a single partial, else with their LSE to the
// workspace.
template <class T>
static void write_results(const Unit<T>& u, const RowState& state) {
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

}  // namespace chunkllama
