// Joins the partials of every row that has more than one (arXiv 2402.15220, equation 5, in base 2).
//
// Grid (rows of the plan's capacity, ceil(Hq / 4)), 128 threads: one warp per (row, query head).
// Rows beyond the plan's and rows whose item has written the output itself exit at once. The
// maximum comes first: the sums then depend on no partial but their own, and their loads overlap.
#pragma once
#include "plan_layout.cuh"
#include "softmax_state.cuh"

struct TppMergeParams {
  void* out;                 // [rows, Hq, D]
  const float* partial_out;  // [slots, Hq, D]
  const float* partial_lse;  // [slots, Hq] base 2
  const int* header;         // the plan's arrays
  const int* merge_indptr;   // [rows + 1]
  const int* merge_slots;    // partial slots of each row, ascending by position: the order of
                             // summation is fixed
  const int* row_flags;      // [rows]
  int num_qo_heads;
  int reserved;
};
static_assert(sizeof(TppMergeParams) == 64, "chunkllama/backends/cuda/source.py, PARAMS");

template <typename T, int HEAD_DIM>
KERNEL(128, 1)
tpp_merge(TppMergeParams p) {
  constexpr int QUADS = HEAD_DIM / 4, PER_LANE = (QUADS + 31) / 32;
  const int lane = threadIdx.x & 31, head = blockIdx.y * 4 + (threadIdx.x >> 5), row = blockIdx.x;
  if (head >= p.num_qo_heads || row >= p.header[NUM_ROWS] || p.row_flags[row]) return;
  const int begin = p.merge_indptr[row], end = p.merge_indptr[row + 1];
  SoftmaxState state = SoftmaxState::empty();
#pragma unroll 4
  for (int i = begin; i < end; i++) {
    const float lse = p.partial_lse[(i64)p.merge_slots[i] * p.num_qo_heads + head];
    state.maximum = state.maximum > lse ? state.maximum : lse;
  }
  float4 sums[PER_LANE];
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) sums[k] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int i = begin; i < end; i++) {
    const i64 at = (i64)p.merge_slots[i] * p.num_qo_heads + head;
    const float weight = state.weight_of({p.partial_lse[at], 1.f});  // a normalised partial
    state.sum += weight;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
      const int quad = k * 32 + lane;
      if (quad >= QUADS) continue;
      const float4 share = *(const float4*)(p.partial_out + at * HEAD_DIM + quad * 4);
      sums[k].x += share.x * weight;
      sums[k].y += share.y * weight;
      sums[k].z += share.z * weight;
      sums[k].w += share.w * weight;
    }
  }
  const float inverse = state.inverse_sum();
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) {
    const int quad = k * 32 + lane;
    if (quad >= QUADS) continue;
    uint2 packed;
    packed.x = Element<T>::pack2(sums[k].x * inverse, sums[k].y * inverse);
    packed.y = Element<T>::pack2(sums[k].z * inverse, sums[k].w * inverse);
    *(uint2*)((T*)p.out + ((i64)row * p.num_qo_heads + head) * HEAD_DIM + quad * 4) = packed;
  }
}
