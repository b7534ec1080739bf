// Online softmax (base 2) of up to 16 rows of scores: updates each row's running maximum m and sum l, rescales its
// output accumulator where the maximum rose, and turns scores into probabilities.
#pragma once
#include <cmath>

#include "api.h"
#include "prefetch.h"
#include "vec.h"

namespace chunkllama {

constexpr int STEP_CHUNKS = 4;                                   // chunks per softmax step: their K and V stay in L2
constexpr int STEP_KEYS = STEP_CHUNKS * CHUNK;
constexpr long SCORE_STRIDE = STEP_KEYS + 16;                    // off powers of two, or tile stores hit 4 L1 sets
constexpr long PROB_STRIDE = STEP_KEYS + 32;
constexpr long OUT_PAD = 16;
constexpr float EMPTY_MAX = -1e30f;                              // finite, so that empty rows need no special case

struct RowState {
  float *max, *sum;  // [16], aligned
  float* out;        // [16, out_stride]
  long out_stride, head_dim;
};

// Multiplies the accumulators of rows whose maximum rises to `risen` and stores the new maxima.
static INLINE void raise_maxima(const float* risen, int rows, const RowState& state) {
  for (int r = 0; r < rows; r++) {
    if (!(risen[r] > state.max[r])) continue;
    const float factor = ::exp2f(state.max[r] - risen[r]);
    state.max[r] = risen[r];
    state.sum[r] *= factor;
    float* o = state.out + r * state.out_stride;
    for (long d = 0; d < state.head_dim; d += W) store(o + d, load(o + d) * factor);
  }
}

// scores [rows, SCORE_STRIDE] -> probabilities: bf16 to `probs`, or float in place where P is float.
// visible[r]: keys of this step that row r sees (MASKED only). Per 2 W keys `lines` cache lines are prefetched.
template <bool MASKED, Precision PRECISION, class P>
static INLINE void online_softmax(float* scores, P* probs, long prob_stride, int rows, int keys, const int* visible, float scale,
                                  const RowState& state, Prefetcher& ahead, int lines) {
  const Vec minus_infinity = set(-INFINITY);
  alignas(64) float risen[16], sums[16];
  Vec v[16];
  for (int r = 0; r < rows; r++) {
    const float* s = scores + r * SCORE_STRIDE;
    Vec m[2] = {minus_infinity, minus_infinity};
    for (int j = 0; j < keys; j += 2 * W)
      for (int u = 0; u < 2; u++) {
        const int at = j + u * W;
        const Vec x = load(s + at);
        m[u] = max(m[u], MASKED ? first_lanes(visible[r] - at, x, minus_infinity) : x);
      }
    v[r] = max(m[0], m[1]);
  }
  for (int r = rows; r < 16; r++) v[r] = minus_infinity;
  reduce_rows<Max>(v, risen);
  bool rises = false;
  for (int i = 0; i < 16; i += W) {
    const Vec old = load(state.max + i), x = max(old, load(risen + i) * scale);
    store(risen + i, x);
    rises |= any(x > old);
  }
  if (rises) raise_maxima(risen, rows, state);
  const Vec scale_v = set(scale);
  for (int r = 0; r < rows; r++) {
    const float* s = scores + r * SCORE_STRIDE;
    P* p = probs + r * prob_stride;
    const Vec m = set(state.max[r]);
    Vec total[2] = {Vec{}, Vec{}};
    for (int j = 0; j < keys; j += 2 * W) {
      Vec x[2];
      for (int u = 0; u < 2; u++) {
        x[u] = load(s + j + u * W) * scale_v - m;
        if (MASKED) x[u] = first_lanes(visible[r] - j - u * W, x[u], minus_infinity);
        x[u] = exp2<PRECISION>(x[u]);
        total[u] += x[u];
      }
      store(p + j, x[0], x[1]);
      ahead.step(lines);
    }
    v[r] = total[0] + total[1];
  }
  for (int r = rows; r < 16; r++) v[r] = Vec{};
  reduce_rows<Sum>(v, sums);
  for (int i = 0; i < 16; i += W) store(state.sum + i, load(state.sum + i) + load(sums + i));
}

}  // namespace chunkllama
