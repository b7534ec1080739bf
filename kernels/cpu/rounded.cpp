// K/V of a chunk in a few bits (KIVI, arXiv 2402.02750) to the pool's layout (layout.h), in the
// thread that calls it: the others compute a step meanwhile.
#include <algorithm>

#include "api.h"
#include "layout.h"
#include "scratch.h"

namespace chunkllama {
namespace {

// Separates codes, of which the first of a byte is in its lowest bits.
template <int BITS>
void separate(const uint8_t* from, long count, uint8_t* to) {
  constexpr int EACH = 8 / BITS, MASK = (1 << BITS) - 1;
  for (long i = 0; i < count / EACH; i++)
    for (int place = 0; place < EACH; place++)
      to[EACH * i + place] = from[i] >> (place * BITS) & MASK;
}

// Rounds to nearest even; no value is a NaN. Compilers vectorize it.
uint32_t rounded(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
void store(float even, float odd, uint32_t* to) { *to = rounded(even) | rounded(odd) << 16; }

// One kv head of one layer. A code times its scale is exact in float, so that a fused
// multiplication and addition yields what two instructions do.
template <int BITS>
class Head {
 public:
  Head(long dim, long key_group)
      : dim_(dim),
        key_group_(key_group),
        codes_(code_scratch_.fit(BLOCK * dim)),
        columns_(column_scratch_.fit(BLOCK * dim)) {}

  // Codes [64][dim], scales and zeros [64 / key_group][dim].
  template <class T>
  void keys(const uint8_t* packed, const float* scales, const float* zeros, T* to) {
    const long block_bytes = BLOCK * dim_ * BITS / 8;
    for (long first = 0; first < CHUNK; first += BLOCK) {
      separate<BITS>(packed + first / BLOCK * block_bytes, BLOCK * dim_, codes_);
      for (long d = 0; d < dim_; d++)
        for (int token = 0; token < BLOCK; token++)
          columns_[d * BLOCK + token] = codes_[token * dim_ + d];
      const long group = first / key_group_ * dim_;
      block(scales + group, zeros + group, to);
      to += Layout<T>::k_block(dim_);
    }
  }

  // Codes [64][dim], scales and zeros [64].
  template <class T>
  void values(const uint8_t* packed, const float* scales, const float* zeros, T* to) {
    const long row_bytes = dim_ * BITS / 8;
    for (long token = 0; token < CHUNK; token += 2) {
      separate<BITS>(packed + token * row_bytes, 2 * dim_, codes_);
      rows(scales + token, zeros + token, to + token * dim_);
    }
  }

 private:
  // The 16 tokens whose codes are in the columns.
  void block(const float* scales, const float* zeros, float* to) const {
    for (long d = 0; d < dim_; d++)
      for (int token = 0; token < BLOCK; token++)
        to[d * BLOCK + token] = columns_[d * BLOCK + token] * scales[d] + zeros[d];
  }
  void block(const float* scales, const float* zeros, bf16* to) const {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(to);
    for (long d = 0; d < dim_; d += 2) {
      const uint8_t *even = columns_ + d * BLOCK, *odd = even + BLOCK;
      for (int token = 0; token < BLOCK; token++)
        store(even[token] * scales[d] + zeros[d], odd[token] * scales[d + 1] + zeros[d + 1],
              pairs + d / 2 * BLOCK + token);
    }
    std::fill(pairs + dim_ / 2 * BLOCK, pairs + Layout<bf16>::k_block(dim_) / 2, 0);
  }

  // Two tokens, whose codes are in rows.
  void rows(const float* scales, const float* zeros, float* to) const {
    for (int token = 0; token < 2; token++)
      for (long d = 0; d < dim_; d++)
        to[token * dim_ + d] = codes_[token * dim_ + d] * scales[token] + zeros[token];
  }
  void rows(const float* scales, const float* zeros, bf16* to) const {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(to);
    for (long d = 0; d < dim_; d++)
      store(codes_[d] * scales[0] + zeros[0], codes_[dim_ + d] * scales[1] + zeros[1], pairs + d);
  }

  const long dim_, key_group_;
  Scratch<uint8_t> code_scratch_, column_scratch_;
  uint8_t *const codes_, *const columns_;
};

template <int BITS, class T>
void widen(const RoundedChunk& a) {
  const long dim = a.head_dim, groups = CHUNK / a.key_group;
  Head<BITS> head(dim, a.key_group);
  for (long layer = 0; layer < a.layers; layer++) {
    T* const to = static_cast<T*>(a.out) + layer * Layout<T>::chunk(a.kv_heads, dim);
    for (long h = 0; h < a.kv_heads; h++) {
      const long at = layer * a.kv_heads + h, codes = at * CHUNK * dim * BITS / 8;
      const long keys = at * groups * dim, values = at * CHUNK;
      head.keys(a.key_codes + codes, a.key_scales + keys, a.key_zeros + keys,
                to + Layout<T>::k_offset(h, dim));
      head.values(a.value_codes + codes, a.value_scales + values, a.value_zeros + values,
                  to + Layout<T>::v_offset(h, a.kv_heads, dim));
    }
  }
}

}  // namespace
}  // namespace chunkllama

using namespace chunkllama;

extern "C" __attribute__((visibility("default"))) void ck_widen_chunk(const RoundedChunk* args) {
  if (args->bits == 2)
    args->kv_type == BF16 ? widen<2, bf16>(*args) : widen<2, float>(*args);
  else
    args->kv_type == BF16 ? widen<4, bf16>(*args) : widen<4, float>(*args);
}
