// RMS normalisation, with the residual added first: sum = x + residual, out = weight * sum /
// rms(sum).
//
// Grid (rows), 256 threads, one CTA per row; float32 inside. Rounded to T: the sum, and the product
// of the normalised row with the weight.
#pragma once
#include "vector.cuh"

struct RmsNormParams {
  const void* x;            // [rows, H], H a multiple of 8
  const void* weight;       // [H]
  const void* residual_in;  // [rows, H], or null: nothing is added and no sum is written
  void* sum;                // [rows, H], may be residual_in
  void* out;                // [rows, H], may be x
  int hidden_size;
  float epsilon;
};
static_assert(sizeof(RmsNormParams) == 48, "chunkllama/backends/cuda/source.py, PARAMS");

constexpr int RMS_NORM_THREADS = 256;

// The sum over the CTA, for every thread; `shared` holds one float per warp.
DEVICE float sum_over_cta(float value, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < RMS_NORM_THREADS / 32; w++) total += shared[w];
  return total;
}

template <typename T>
KERNEL(RMS_NORM_THREADS, 1)
rms_norm(RmsNormParams p) {
  DYNAMIC_SHARED(shared);
  const i64 row = (i64)blockIdx.x * p.hidden_size;
  const T* x = (const T*)p.x + row;
  float squares = 0.f;
  for (int d = threadIdx.x * VECTOR; d < p.hidden_size; d += RMS_NORM_THREADS * VECTOR) {
    uint4 packed = load16(x + d);
    float values[VECTOR];
    unpack8<T>(values, packed);
    if (p.residual_in) {
      float residual[VECTOR];
      unpack8<T>(residual, load16((const T*)p.residual_in + row + d));
#pragma unroll
      for (int e = 0; e < VECTOR; e++) values[e] += residual[e];
      packed = pack8<T>(values);
      unpack8<T>(values, packed);
      store16((T*)p.sum + row + d, packed);
    }
#pragma unroll
    for (int e = 0; e < VECTOR; e++) squares += values[e] * values[e];
  }
  const float scale = rsqrt_fast(sum_over_cta(squares, (float*)shared) / p.hidden_size + p.epsilon);
  const T* summed =
      p.residual_in ? (const T*)p.sum + row : x;  // each thread reads back what it wrote itself
  for (int d = threadIdx.x * VECTOR; d < p.hidden_size; d += RMS_NORM_THREADS * VECTOR) {
    float values[VECTOR], weight[VECTOR];
    unpack8<T>(values, load16(summed + d));
    unpack8<T>(weight, load16((const T*)p.weight + d));
#pragma unroll
    for (int e = 0; e < VECTOR; e++) values[e] *= scale * weight[e];
    store16((T*)p.out + row + d, pack8<T>(values));
  }
}
