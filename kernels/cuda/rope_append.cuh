// Rotates q and k (rotate-half, as in Hugging Face's Llama) and appends k and v to the rows'
// chunks.
//
// Grid (rows of the plan's capacity), any number of threads. Everything a row needs is on the
// device: its position, and in row_tail where its tail item's chunk list starts, so a step with an
// unchanged plan copies nothing.
#pragma once
#include "plan_layout.cuh"
#include "vector.cuh"

struct RopeAppendParams {
  const void* qkv;       // [rows, (Hq + 2 Hkv) D]
  void* q;               // [rows, Hq, D]
  void* kv;              // [num_chunks, 2, Hkv, 64, D]; chunks stand chunk_stride elements apart
  const float* cos_sin;  // [max_position, D]: cos of the D / 2 frequencies, then sin
  const int* positions;  // [rows]
  const int* header;     // the plan's arrays
  const int* chunk_ids;
  const int* row_tail;  // [rows, 2]: offset into chunk_ids, first position
  i64 chunk_stride;
  int num_qo_heads;
  int num_kv_heads;
};
static_assert(sizeof(RopeAppendParams) == 80, "chunkllama/backends/cuda/source.py, PARAMS");

template <typename T, int HEAD_DIM>
KERNEL(256, 1)
rope_append(RopeAppendParams p) {
  constexpr int HALF = HEAD_DIM / 2, PAIRS = HALF / VECTOR;
  const int row = blockIdx.x;
  if (row >= p.header[NUM_ROWS]) return;
  const int position = p.positions[row], offset = position - p.row_tail[2 * row + 1];
  const int chunk = p.chunk_ids[p.row_tail[2 * row] + offset / CHUNK];
  const int num_heads = p.num_qo_heads + 2 * p.num_kv_heads,
            first_value = p.num_qo_heads + p.num_kv_heads;
  const T* source = (const T*)p.qkv + (i64)row * num_heads * HEAD_DIM;
  T* slot = (T*)p.kv + chunk * p.chunk_stride + (i64)(offset % CHUNK) * HEAD_DIM;
  const float* cosines = p.cos_sin + (i64)position * HEAD_DIM;

  for (int i = threadIdx.x; i < num_heads * PAIRS; i += blockDim.x) {
    const int head = i / PAIRS, d = i % PAIRS * VECTOR;  // elements d.. and HALF + d.. of one head
    uint4 first = load16(source + head * HEAD_DIM + d),
          second = load16(source + head * HEAD_DIM + HALF + d);
    if (head < first_value) {
      float x[VECTOR], y[VECTOR];
      unpack8<T>(x, first);
      unpack8<T>(y, second);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const float cosine = cosines[d + e], sine = cosines[HALF + d + e],
                    rotated = x[e] * cosine - y[e] * sine;
        y[e] = y[e] * cosine + x[e] * sine;
        x[e] = rotated;
      }
      first = pack8<T>(x);
      second = pack8<T>(y);
    }
    // Of a chunk, the heads of K come first, then the heads of V, in the order in which qkv has
    // them.
    T* destination = head < p.num_qo_heads ? (T*)p.q + ((i64)row * p.num_qo_heads + head) * HEAD_DIM
                                           : slot + (i64)(head - p.num_qo_heads) * CHUNK * HEAD_DIM;
    store16(destination + d, first);
    store16(destination + HALF + d, second);
  }
}
