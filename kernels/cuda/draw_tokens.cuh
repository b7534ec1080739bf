// Tokens drawn from rows of logits: chunkllama/backends/draws.py states what is computed.
//
// Grid (draws), 512 threads, one CTA per draw. Weights are 2^((logit - top) * scale), computed in
// every pass, so that nothing but the logits is read and nothing but the tokens is written. The
// edge of top-k or top-p is found without sorting: positive floats are in the order of their bits,
// and eight passes choose four bits each by what the weights from there on count or add up to. Sums
// are integers, so that their order does not matter.
#pragma once
#include "device.cuh"

struct DrawRow {
  u64 seed;
  int row, choice, position;
  u32 top_k;  // 0: all
  u32 top_p;  // in 2^-32; 0: all
  float min_p;
  float scale;  // log2(e) / temperature
  u32 unused;
};

struct DrawTokensParams {
  const float* logits;  // [N, V]
  const DrawRow* rows;  // [draws]
  i64* tokens;          // [draws]
  int vocab_size;
};
static_assert(sizeof(DrawRow) == 40 && sizeof(DrawTokensParams) == 32,
              "chunkllama/backends/cuda/source.py, PARAMS and DRAW_ROW");

constexpr int DRAW_THREADS = 512;
constexpr int DRAW_WARPS = DRAW_THREADS / 32;
constexpr int DRAW_BINS = 16;    // of a pass: four bits
constexpr int DRAW_BLOCK = 256;  // tokens, as in draws.py
constexpr float DRAW_LN2 = 0.693147181f;

struct DrawShared {
  u64 bins[DRAW_BINS * DRAW_THREADS];  // a column for each thread
  u64 partial[DRAW_BINS * 32];
  u64 total[DRAW_BINS];
  float best[DRAW_WARPS];
  u32 where[DRAW_WARPS];
};

// ---- Random numbers: Philox4x32-10, as in chunkllama/backends/philox.py.
DEVICE u32 multiply_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }

// Word `index` % 4 of the four words that lane `index` / 4 of a stream has.
DEVICE u32 random_word(const DrawRow& draw, u32 stream, u32 index) {
  u32 c0 = draw.position, c1 = draw.choice, c2 = index / 4, c3 = stream;
  u32 k0 = (u32)draw.seed, k1 = (u32)(draw.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const u32 high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const u32 word = index % 4;
  return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
}

// A standard Gumbel number -log(-log(u)) with u = (word + 1/2) / 2^32; absolute error below 2^-19.
DEVICE float gumbel(u32 word) {
  float exponential;  // -log(u)
  if (word >> 31) {   // u is near 1: -log(1 - y) = 2 atanh(y / (2 - y)), whose series ends soon
    const float y = ((float)~word + 0.5f) * 0x1p-32f, s = y / (2.f - y), square = s * s;
    float sum = 1.f / 15.f;
#pragma unroll
    for (int odd = 13; odd > 0; odd -= 2) sum = sum * square + 1.f / odd;
    exponential = 2.f * s * sum;
  } else {
    exponential = -DRAW_LN2 * log2_fast(((float)word + 0.5f) * 0x1p-32f);
  }
  return -DRAW_LN2 * log2_fast(exponential);
}

// ---- The largest value over the CTA and its index, the first among equals; for every thread. NaN
// is never it.
DEVICE void take_larger(float& value, u32& index, float other, u32 other_index) {
  if (other > value || (other == value && other_index < index)) {
    value = other;
    index = other_index;
  }
}
DEVICE void best_of_cta(float& value, u32& index, DrawShared& shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    take_larger(value, index, other, shuffle_xor(index, mask));
  }
  __syncthreads();  // what an earlier call left has been read
  if ((threadIdx.x & 31) == 0) {
    shared.best[threadIdx.x >> 5] = value;
    shared.where[threadIdx.x >> 5] = index;
  }
  __syncthreads();
  for (int warp = 0; warp < DRAW_WARPS; warp++)
    take_larger(value, index, shared.best[warp], shared.where[warp]);
}

// ---- Weights
struct Weights {
  const float* logits;
  int size;
  float top, scale;
  DEVICE float operator[](int token) const { return exp2_fast((logits[token] - top) * scale); }
};

// A weight, at most 1, in parts of 2^-40, rounded down.
DEVICE u64 fixed_point(u32 bits) {
  const u32 shift = 127 - (bits >> 23);
  return shift > 40 ? 0 : (u64)((bits & 0x7fffffu) | 0x800000u) << 17 >> shift;
}

// Bits of the largest weight so that those from it on number `least` (BY_SUM: hold `least` / 2^32
// of the sum) of the weights whose bits are at least `edge`.
template <bool BY_SUM>
DEVICE u32 falling_edge(const Weights& weights, u32 edge, u32 least, DrawShared& shared) {
  const int thread = threadIdx.x;
  u32 chosen = 0;
  u64 wanted = least, above = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int bin = 0; bin < DRAW_BINS; bin++) shared.bins[bin * DRAW_THREADS + thread] = 0;
    for (int token = thread; token < weights.size; token += DRAW_THREADS) {
      const u32 bits = float_bits(weights[token]);
      // `chosen` has zeros below the bits that are known: a token beside them has others above.
      if (bits < edge || (bits ^ chosen) >> shift >= DRAW_BINS) continue;
      shared.bins[(bits >> shift) % DRAW_BINS * DRAW_THREADS + thread] +=
          BY_SUM ? fixed_point(bits) : 1;
    }
    __syncthreads();
    u64 sum = 0;  // each warp adds up one bin
    for (int i = thread % 32; i < DRAW_THREADS; i += 32)
      sum += shared.bins[thread / 32 * DRAW_THREADS + i];
    shared.partial[thread] = sum;
    __syncthreads();
    if (thread < DRAW_BINS) {
      sum = 0;
      for (int i = 0; i < 32; i++) sum += shared.partial[thread * 32 + i];
      shared.total[thread] = sum;
    }
    __syncthreads();
    if (BY_SUM && shift == 28) {
      u64 all = 0;
      for (int bin = 0; bin < DRAW_BINS; bin++) all += shared.total[bin];
      wanted = (all >> 32) * least + ((all & 0xffffffffu) * least >> 32);
      if (wanted == 0) wanted = 1;
    }
    u32 bin = DRAW_BINS - 1;
    while (bin > 0 && above + shared.total[bin] < wanted) above += shared.total[bin--];
    chosen |= bin << shift;
    __syncthreads();
  }
  return chosen;
}

// The sum of a block's weights from the edge on, for every lane of the warp.
DEVICE float block_sum(const Weights& weights, u32 edge, int first) {
  float sum = 0.f;
  for (int i = threadIdx.x & 31; i < DRAW_BLOCK; i += 32) {
    if (first + i >= weights.size) break;
    const float weight = weights[first + i];
    if (float_bits(weight) >= edge) sum += weight;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

KERNEL(DRAW_THREADS, 1)
draw_tokens(DrawTokensParams p) {
  DYNAMIC_SHARED(memory);
  DrawShared& shared = *(DrawShared*)memory;
  const DrawRow draw = p.rows[blockIdx.x];
  Weights weights = {p.logits + (i64)draw.row * p.vocab_size, p.vocab_size, 0.f, draw.scale};

  float best = NEGATIVE_INFINITY;
  u32 where = 0;
  for (int token = threadIdx.x; token < weights.size; token += DRAW_THREADS)
    take_larger(best, where, weights.logits[token], token);
  best_of_cta(best, where, shared);
  weights.top = best;

  u32 edge = float_bits(draw.min_p);
  if (draw.top_k) {
    const u32 found = falling_edge<false>(weights, 0, draw.top_k, shared);
    edge = found > edge ? found : edge;
  }
  if (draw.top_p) {
    const u32 found = falling_edge<true>(weights, edge, draw.top_p, shared);
    edge = found > edge ? found : edge;
  }

  // The block: a warp adds up 32 of them, then each lane draws a number for one.
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int num_blocks = (weights.size + DRAW_BLOCK - 1) / DRAW_BLOCK;
  best = NEGATIVE_INFINITY;
  where = 0;
  for (int group = warp * 32; group < num_blocks; group += DRAW_THREADS) {
    float sum = 0.f;
    for (int i = 0; i < 32 && group + i < num_blocks; i++) {
      const float total = block_sum(weights, edge, (group + i) * DRAW_BLOCK);
      if (i == lane) sum = total;
    }
    const u32 block = group + lane;
    if (block < (u32)num_blocks)
      take_larger(best, where, DRAW_LN2 * log2_fast(sum) + gumbel(random_word(draw, 0, block)),
                  block);
  }
  best_of_cta(best, where, shared);

  // The token of the block.
  const u32 token = where * DRAW_BLOCK + threadIdx.x;
  best = NEGATIVE_INFINITY;
  where *= DRAW_BLOCK;
  if (threadIdx.x < DRAW_BLOCK && token < (u32)weights.size) {
    const float weight = weights[token];
    if (float_bits(weight) >= edge)
      take_larger(best, where, DRAW_LN2 * log2_fast(weight) + gumbel(random_word(draw, 1, token)),
                  token);
  }
  best_of_cta(best, where, shared);
  if (threadIdx.x == 0) p.tokens[blockIdx.x] = where;
}
