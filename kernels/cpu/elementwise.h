// The small ops of a layer, each over a range of rows so that a team can share them.
#pragma once
#include "api.h"

namespace chunkllama {

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight for rows [begin, end); x and y may be the same.
// Types are F32 or BF16; sums are float.
struct NormArgs {
  const void *x, *residual;  // residual (may be null) is added first
  void *sum, *y;             // sum: where x + residual goes (may be null without a residual)
  const float* weight;
  int64_t hidden, x_stride, y_stride;
  int32_t x_type, y_type;
  float eps;
};
void rms_norm_rows(const NormArgs& args, int64_t begin, int64_t end);

// Rotates q and k (rotate-half), writes q to args.q and k, v into the rows' chunks.
void rope_append_rows(const RopeArgs& args, int64_t begin, int64_t end);
// The first row at or after `row` where a thread may begin: an odd token shares memory with the
// even one before it, which must be written first.
int64_t append_boundary(const RopeArgs& args, int64_t row);

// y = silu(gate) * up for rows of [gate | up].
void silu_and_mul_rows(const void* gate_up, void* y, int64_t size, int32_t type, int64_t begin,
                       int64_t end);

// Copies the first `tokens` of a chunk; the destination's last pair gets no token beyond them.
void copy_chunk(void* kv, const Heads& heads, int64_t source, int64_t destination, int64_t tokens);

}  // namespace chunkllama
