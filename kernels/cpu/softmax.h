// Online softmax (base 2) of up to 16 rows of scores: turns scores into probabilities relative to
// each row's reference m, adds them to its sum, and where m must rise rescales its output
// accumulator.
#pragma once
#include <cmath>

#include "api.h"
#include "prefetch.h"
#include "vec.h"

namespace chunkllama {

constexpr int STEP_CHUNKS = 2;  // chunks per softmax step: scores and accumulators stay in L1
constexpr int STEP_KEYS = STEP_CHUNKS * CHUNK;
constexpr long SCORE_STRIDE = STEP_KEYS + 16;  // no power of two, or tile stores hit 4 L1 sets
constexpr long PROB_STRIDE = STEP_KEYS + 32;
constexpr long OUT_PAD = 16;
constexpr float NO_REFERENCE = -1e30f;  // finite: -inf - -inf would be NaN
// Exponents may exceed the reference by this much before it follows the maximum: a float holds the
// sums, and accumulators are rarely rescaled (as in FlashAttention-4).
constexpr float SLACK = 8;

struct RowState {
  float* reference;  // [rows], NO_REFERENCE before a row's first key
  float* sum;        // [rows, W], lane by lane
  float* out;        // [rows, out_stride]
  long out_stride, head_dim;
  bool independent;  // references rise with each row's own maxima alone
  RowState from(int row) const {
    return {reference + row, sum + row * W, out + row * out_stride, out_stride, head_dim,
            independent};
  }
};

// Sets references to the rows' maxima where these are larger, and rescales what was summed up
// relative to the old ones.
template <bool MASKED>
static INLINE void raise_references(const float* scores, int rows, int keys, const int* visible,
                                    float scale, const RowState& state) {
  const Vec minus_infinity = set(-INFINITY);
  for (int r = 0; r < rows; r++) {
    const float* s = scores + r * SCORE_STRIDE;
    Vec m[2] = {minus_infinity, minus_infinity};
    for (int j = 0; j < keys; j += 2 * W)
      for (int u = 0; u < 2; u++) {
        const int at = j + u * W;
        const Vec x = load(s + at);
        m[u] = max(m[u], MASKED ? first_lanes(visible[r] - at, x, minus_infinity) : x);
      }
    const float risen = largest(max(m[0], m[1])) * scale, before = state.reference[r];
    if (!(risen > before)) continue;
    state.reference[r] = risen;
    if (before == NO_REFERENCE) continue;  // nothing summed up yet
    const float factor = ::exp2f(before - risen);
    store(state.sum + r * W, load(state.sum + r * W) * factor);
    float* o = state.out + r * state.out_stride;
    for (long d = 0; d < state.head_dim; d += W) store(o + d, load(o + d) * factor);
  }
}

// probs = 2^(scores * scale - reference) and their sums by row and lane; false if some exponent
// exceeds SLACK.
template <bool MASKED, bool SCALED, Precision PRECISION, class P>
static INLINE bool exponentiate(const float* scores, P* probs, long prob_stride, int rows, int keys,
                                const int* visible, const float* factors, float scale,
                                const float* reference, Vec* sums, Prefetcher& ahead) {
  Vec top[2] = {Vec{}, Vec{}};
  const Vec scale_v = set(scale);
  for (int r = 0; r < rows; r++) {
    const float* s = scores + r * SCORE_STRIDE;
    P* p = probs + r * prob_stride;
    const Vec m = set(reference[r]);
    Vec total[2] = {Vec{}, Vec{}};
    for (int j = 0; j < keys; j += 2 * W) {
      Vec x[2];
      for (int u = 0; u < 2; u++) {
        x[u] = load(s + j + u * W) * scale_v - m;
        if (MASKED) x[u] = first_lanes(visible[r] - j - u * W, x[u], set(-INFINITY));
        top[u] = max(x[u], top[u]);  // in this order: a row of NaN hides no other row's rise
        x[u] = exp2<PRECISION>(x[u]);
        total[u] += x[u];
        if (SCALED) x[u] *= load(factors + j + u * W);
      }
      store(p + j, x[0], x[1]);
      ahead.step();
    }
    sums[r] = total[0] + total[1];
  }
  return !any(max(top[0], top[1]) > SLACK);
}

// scores [rows, SCORE_STRIDE] -> probs [rows, prob_stride]. visible[r]: keys of this step that row
// r sees (MASKED only). factors [keys]: what each key's probability is multiplied by once it is
// summed up (SCALED only). The first attempt uses the current references: one pass and no search
// for maxima. It is left out where rows are to be independent: if it fails, the references of all
// rows rise. `ahead` makes a step per 2 W keys of a row.
template <bool MASKED, bool SCALED, Precision PRECISION, class P>
static INLINE void online_softmax(const float* scores, P* probs, long prob_stride, int rows,
                                  int keys, const int* visible, const float* factors, float scale,
                                  const RowState& state, Prefetcher& ahead) {
  Vec sums[16];
  auto attempt = [&] {
    return exponentiate<MASKED, SCALED, PRECISION>(scores, probs, prob_stride, rows, keys, visible,
                                                   factors, scale, state.reference, sums, ahead);
  };
  // The first step has no reference yet and would always exceed SLACK.
  if (state.independent || state.reference[0] == NO_REFERENCE || !attempt()) {
    raise_references<MASKED>(scores, rows, keys, visible, scale, state);
    attempt();
  }
  for (int r = 0; r < rows; r++) store(state.sum + r * W, load(state.sum + r * W) + sums[r]);
}

}  // namespace chunkllama
