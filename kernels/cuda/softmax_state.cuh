// The state of a softmax over some keys: the one type that tiles, key-split warps and partials are
// joined with.
#pragma once
#include "device.cuh"

// Base 2: a key of score s (times scale * log2 e) weighs 2^(s - maximum), and `sum` adds these
// weights. Outputs are accumulated with the same weights, so joining two states means scaling both
// sides to the common maximum. No visible key: maximum = -inf, sum = 0.
struct SoftmaxState {
  float maximum, sum;

  static DEVICE SoftmaxState empty() { return {NEGATIVE_INFINITY, 0.f}; }

  // The maximum, kept finite for an empty state so that 2^(s - anchor) is 0 and not NaN.
  DEVICE float anchor() const { return maximum == NEGATIVE_INFINITY ? 0.f : maximum; }

  // Lets `candidate` into the maximum; returns the factor for everything accumulated so far.
  DEVICE float raise(float candidate) {
    const float previous = maximum;
    maximum = maximum > candidate ? maximum : candidate;
    const float factor = exp2_fast(previous - anchor());
    sum *= factor;
    return factor;
  }

  // What another state's sum and outputs count by; this state's maximum is at least the other's.
  DEVICE float weight_of(SoftmaxState other) const { return exp2_fast(other.maximum - anchor()); }

  DEVICE float inverse_sum() const { return sum > 0.f ? 1.f / sum : 0.f; }

  // Base-2 log-sum-exp of the scores; -inf for no visible key.
  DEVICE float log_sum() const { return sum > 0.f ? maximum + log2_fast(sum) : NEGATIVE_INFINITY; }
};
