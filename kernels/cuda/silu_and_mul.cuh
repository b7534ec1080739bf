// out = silu(gate) * up, with gate and up side by side in one row. Grid (rows, ceil(I / 8 / 256)),
// 256 threads.
#pragma once
#include "vector.cuh"

struct SiluAndMulParams {
  const void* gate_up;    // [rows, 2 I], I a multiple of 8
  void* out;              // [rows, I]
  int intermediate_size;  // I
  int reserved;
};
static_assert(sizeof(SiluAndMulParams) == 24, "chunkllama/backends/cuda/source.py, PARAMS");

template <typename T>
KERNEL(256, 1)
silu_and_mul(SiluAndMulParams p) {
  constexpr float LOG2_E = 1.4426950408889634f;
  const int d = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (d >= p.intermediate_size) return;
  const i64 row = blockIdx.x;
  float gate[VECTOR], up[VECTOR];
  unpack8<T>(gate, load16((const T*)p.gate_up + row * 2 * p.intermediate_size + d));
  unpack8<T>(up, load16((const T*)p.gate_up + (row * 2 + 1) * p.intermediate_size + d));
#pragma unroll
  for (int e = 0; e < VECTOR; e++) gate[e] = gate[e] / (1.f + exp2_fast(-gate[e] * LOG2_E)) * up[e];
  store16((T*)p.out + row * p.intermediate_size + d, pack8<T>(gate));
}
