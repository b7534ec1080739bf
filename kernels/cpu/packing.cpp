#include <algorithm>
#include <cmath>

#include "linear.h"
#include "scratch.h"
#include "vec.h"

namespace chunkllama {
namespace {

INLINE float element(const void* w, int32_t type, int64_t i) {
  return type == BF16 ? to_float(static_cast<const bf16*>(w)[i]) : static_cast<const float*>(w)[i];
}

// Where element (column, k) of a packed weight lies: bytes from its start.
INLINE int64_t packed_offset(const Linear& l, int64_t column, int64_t k) {
  const int type = l.type;
  const int64_t block = (column / UNIT * (l.k / K_BLOCK[type]) + k / K_BLOCK[type]) * K_BYTES[type];
  const int64_t half = column % UNIT / 16, c = column % 16, within = k % K_BLOCK[type];
  if (type == F32) return block + (within * UNIT + column % UNIT) * 4;
  if (type == BF16) return block + half * 1024 + (within / 2 * 32 + c * 2 + within % 2) * 2;
  return block + SCALES + half * 512 + within / 4 * 64 + c * 4 + within % 4;
}

// Packs one column, given as floats padded with zeros.
void pack_column(const Linear& l, int64_t column, const float* values) {
  char* to = static_cast<char*>(const_cast<void*>(l.weight)) + packed_offset(l, column, 0);
  if (l.type == F32) {
    for (int64_t i = 0; i < l.k; i++) memcpy(to + i * UNIT * 4, values + i, 4);
  } else if (l.type == BF16) {
    for (int64_t block = 0; block < l.k; block += 32, to += K_BYTES[BF16])
      for (int i = 0; i < 32; i += 2) {
        const uint32_t pair = to_bf16(values[block + i]) | uint32_t(to_bf16(values[block + i + 1]))
                                                               << 16;
        memcpy(to + i * 32, &pair, 4);
      }
  } else {
    char* scales = static_cast<char*>(const_cast<void*>(l.weight)) +
                   packed_offset(l, column / UNIT * UNIT, 0) - SCALES;
    for (int64_t block = 0; block < l.k;
         block += 32, to += K_BYTES[INT8], scales += K_BYTES[INT8]) {
      float top = 0;
      for (int i = 0; i < 32; i++)
        if (!(std::fabs(values[block + i]) <= top) && top == top)  // a NaN is kept
          top = std::fabs(values[block + i]);
      const bf16 scale = to_bf16(top / 127.f);
      const float inverse = to_float(scale) > 0 ? 1.f / to_float(scale) : 0.f;
      memcpy(scales + column % UNIT * 2, &scale, 2);
      for (int i = 0; i < 32; i++) {
        const long q = std::lrint(values[block + i] * inverse);
        to[i / 4 * 64 + i % 4] = char(std::min(127L, std::max(-127L, q)) + 128);
      }
    }
  }
}

}  // namespace

void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Linear& packed,
                int64_t begin, int64_t end) {
  static thread_local Scratch<float> column_values;
  float* values = column_values.fit(packed.k);
  std::fill(values, values + packed.k, 0.f);
  for (int64_t column = begin * UNIT; column < end * UNIT; column++) {
    for (int64_t i = 0; i < k; i++)
      values[i] = column < n ? element(w, w_type, column * k + i) : 0.f;
    pack_column(packed, column, values);
  }
}

void unpack_row(const Linear& packed, int64_t column, float* to, int64_t size) {
  const char* from = static_cast<const char*>(packed.weight) + packed_offset(packed, column, 0);
  const int64_t block = K_BLOCK[packed.type];
  for (int64_t at = 0; at < size; at += block, from += K_BYTES[packed.type])
    for (int64_t i = 0; i < std::min(block, size - at); i++)
      to[at + i] = packed.type == F32 ? element(from, F32, i * UNIT)
                                      : element(from, BF16, i / 2 * 32 + i % 2);
}

}  // namespace chunkllama
