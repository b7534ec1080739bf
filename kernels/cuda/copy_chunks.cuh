// Copies the first tokens of chunks to other chunks, in every layer: copy-on-write of partly shared
// chunks.
//
// Grid (copies, 2 Hkv, layers), any number of threads; one CTA copies the tokens of one (K or V, kv
// head).
#pragma once
#include "plan_layout.cuh"

struct CopyChunksParams {
  const u64*
      layers;  // [layers] addresses of the pools, each [num_chunks, 2, Hkv, 64, D] 16-bit elements
  const int* triples;  // [copies, 3]: source chunk, destination chunk, number of tokens
  i64 chunk_stride;    // elements
  int head_dim;
  int reserved;
};
static_assert(sizeof(CopyChunksParams) == 32, "chunkllama/backends/cuda/source.py, PARAMS");

template <int ELEMENT_BYTES>
KERNEL(128, 1)
copy_chunks(CopyChunksParams p) {
  const int* triple = p.triples + 3 * blockIdx.x;
  const i64 head = (i64)blockIdx.y * CHUNK * p.head_dim;
  unsigned char* pool = (unsigned char*)p.layers[blockIdx.z];
  const unsigned char* source = pool + (triple[0] * p.chunk_stride + head) * ELEMENT_BYTES;
  unsigned char* destination = pool + (triple[1] * p.chunk_stride + head) * ELEMENT_BYTES;
  const int bytes = triple[2] * p.head_dim * ELEMENT_BYTES;
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    store16(destination + i, load16(source + i));
}
