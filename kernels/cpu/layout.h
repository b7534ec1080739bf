// Where K and V of a chunk lie. One layer of the pool is [num_chunks][K of all kv heads | V of all
// kv heads].
//
//   bf16  K [4][Dp/2][16][2]: blocks of 16 tokens, dimensions in pairs;
//         Dp = head_dim rounded up to 32, the rest zero
//         V [32][D][2]: tokens in pairs. An even token's append zeroes its pair's other half.
//   fp32  K [4][D][16], V [64][D].
//   int8  the codes as fp32's values, behind those of all heads the scales, bf16: of each kv head
//         [64] of K, [64] of V. A value is its code times the scale of its token and head.
//
// Tile loads and vector loads read both without rearrangement; a partly filled chunk is a prefix
// of each.
#pragma once
#include "api.h"
#include "vec.h"

namespace chunkllama {

template <class T>
struct Layout {
  static constexpr bool PAIRS = std::is_same<T, bf16>::value;
  static constexpr bool SCALED = std::is_same<T, int8_t>::value;
  static constexpr long k_dim(long d) { return PAIRS ? (d + 31) / 32 * 32 : d; }
  static constexpr long k_elements(long d) { return CHUNK * k_dim(d); }
  static constexpr long v_elements(long d) { return CHUNK * d; }
  // From one block of 16 tokens to the next, and from one (pair of) dimension to the next.
  static constexpr long k_block(long d) { return BLOCK * k_dim(d); }
  static constexpr long k_step() { return PAIRS ? 2 * BLOCK : BLOCK; }
  // From 16 dimensions to the next 16, and from one (pair of) token to the next.
  static constexpr long v_block() { return PAIRS ? 2 * BLOCK : BLOCK; }
  static constexpr long v_step(long d) { return PAIRS ? 2 * d : d; }
  // Of a head's scales, as many elements as their bytes.
  static constexpr long scale_elements() { return SCALED ? 2 * CHUNK * sizeof(bf16) : 0; }
  // A whole chunk, and where a head's K, V and scales start in it.
  static constexpr long chunk(long kv_heads, long d) {
    return kv_heads * (k_elements(d) + v_elements(d) + scale_elements());
  }
  static constexpr long k_offset(long head, long d) { return head * k_elements(d); }
  static constexpr long v_offset(long head, long kv_heads, long d) {
    return kv_heads * k_elements(d) + head * v_elements(d);
  }
  static constexpr long scale_offset(long head, long kv_heads, long d) {
    return kv_heads * (k_elements(d) + v_elements(d)) + head * scale_elements();
  }
  // Elements that hold the first `tokens` tokens.
  static constexpr long k_used(long tokens, long d) {
    return (tokens + BLOCK - 1) / BLOCK * k_block(d);
  }
  static constexpr long v_used(long tokens, long d) {
    return PAIRS ? (tokens + 1) / 2 * 2 * d : tokens * d;
  }
};

}  // namespace chunkllama
