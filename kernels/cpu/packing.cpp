#include <algorithm>
#include <cmath>

#include "linear.h"
#include "quantized.h"
#include "scratch.h"
#include "vec.h"

namespace chunkllama {
namespace {

INLINE float f16_to_float(uint16_t x) {
  uint16_t lane[W] = {x};
  return load_f16(lane)[0];
}
INLINE float element(const void* w, int32_t type, int64_t i) {
  if (type == F32) return static_cast<const float*>(w)[i];
  const uint16_t half = static_cast<const uint16_t*>(w)[i];
  return type == F16 ? f16_to_float(half) : to_float(half);
}

// Elements [first, first + size) as floats.
void widen(const void* w, int32_t type, int64_t first, int64_t size, float* to) {
  if (type == F32) {
    memcpy(to, static_cast<const float*>(w) + first, size_t(size) * 4);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(w) + first;
  int64_t i = 0;
  for (; i + W <= size; i += W) store(to + i, type == F16 ? load_f16(half + i) : load(half + i));
  for (; i < size; i++) to[i] = element(half, type, i);
}

// Where the k block that holds (column, k) begins.
INLINE char* block_of(const Weights& w, int64_t packed_k, int64_t column, int64_t k) {
  const int64_t block = column / UNIT * (packed_k / K_BLOCK[w.type]) + k / K_BLOCK[w.type];
  return static_cast<char*>(const_cast<void*>(w.data)) + block * block_bytes(w);
}

// Where the codes of a column begin in its block, and the code of k there: int8.
INLINE int64_t byte_of(int64_t column, int64_t k) {
  return column % UNIT / 16 * 512 + k / 4 * 64 + column % 16 * 4 + k % 4;
}
// int4: the byte, its lower nibble for even k.
INLINE int64_t nibbles_of(int64_t column, int64_t k) {
  return column % UNIT / 16 * 256 + k / 8 * 64 + column % 16 * 4 + k % 8 / 2;
}

// Stores the codes of one column and 32 k: `codes` one a byte.
INLINE void store_codes(const Weights& w, char* block, int64_t column, const uint8_t* codes) {
  char* to = block + header_bytes(w);
  if (w.type == INT8) {
    for (int i = 0; i < 32; i += 4) memcpy(to + byte_of(column, i), codes + i, 4);
  } else {
    for (int i = 0; i < 32; i += 8) {
      uint32_t nibbles = 0;
      for (int j = 0; j < 8; j++) nibbles |= uint32_t(codes[i + j] & 15) << 4 * j;
      memcpy(to + nibbles_of(column, i), &nibbles, 4);
    }
  }
}
INLINE void store_scale(char* block, int64_t column, int place, uint16_t bits) {
  memcpy(block + place * SCALES + column % UNIT * 2, &bits, 2);
}

// The largest magnitude with its sign; NaN if there is one.
INLINE float extreme(const float* values) {
  Vec top{};
  IntVec broken{};
  for (int i = 0; i < 32; i += W) {
    const Vec x = load(values + i);
    broken |= x != x;
    top = max(top, (Vec)((IntVec)x & 0x7fffffff));
  }
  if (any(broken)) return NAN;
  const float magnitude = largest(top);
  int i = 0;
  while (std::fabs(values[i]) != magnitude) i++;
  return values[i];
}
INLINE float inverse_of(float scale) {
  const float inverse = 1.f / scale;
  return std::isfinite(inverse) ? inverse : 0.f;
}

// int8 codes of 32 values for a scale.
INLINE void round_codes(const float* values, float scale, uint8_t* codes) {
  const Vec inverse = set(inverse_of(scale)), low = set(-127.f), high = set(127.f);
  const Vec magic = set(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < 32; i += W) {
    Vec q = (load(values + i) * inverse + magic) - magic;
    q = q < low ? low : q;
    q = q > high ? high : q;
    const IntVec code = __builtin_convertvector(q, IntVec) + 128;
    const ByteVec bytes = __builtin_convertvector(code, ByteVec);
    memcpy(codes + i, &bytes, W);
  }
}

// The values of int4's codes, which ascend, and the midpoints between each two.
struct Grid {
  float entries[16] = {}, middles[16] = {};
  explicit Grid(const Weights& w) {
    if (w.type == INT4)
      for (int i = 0; i < 16; i++) entries[i] = w.table[i] * w.factor;
    for (int i = 0; i < 15; i++) middles[i] = (entries[i] + entries[i + 1]) / 2;
  }
};

struct Fit {
  float error;  // sum of squared errors relative to the largest value
  float scale;  // that suits the codes best
};

// Codes of 32 values for a scale, of the nearest entries; `top` is the largest value.
INLINE Fit nearest_codes(const float* values, float top, float scale, const Grid& grid,
                         uint8_t* codes) {
  const Vec inverse = set(inverse_of(scale)), unit = set(inverse_of(top));
  const Table entries(grid.entries), middles(grid.middles);
  Vec error{}, product{}, square{};
  for (int i = 0; i < 32; i += W) {
    const Vec x = load(values + i), scaled = x * inverse;
    IntVec code{};
    for (int step = 8; step; step /= 2)
      code += (scaled > middles.at<0>(code + (step - 1))) & step;
    const Vec entry = entries.at<0>(code);
    const ByteVec bytes = __builtin_convertvector(code, ByteVec);
    memcpy(codes + i, &bytes, W);
    const Vec off = (x - entry * scale) * unit;
    error += off * off;
    product += x * unit * entry;
    square += entry * entry;
  }
  return {sum(error), sum(product) / sum(square) * top};
}

// The best of several scales that map the extreme value near an end of the grid, in squared error:
// values of a block are rarely spread so that the extreme one should be exact. Then the scale that
// suits the codes of the best.
float int4_scale(const float* values, float top, const Grid& grid, uint8_t* codes) {
  uint8_t tried[32];
  Fit best{INFINITY, 0};
  float scale = 0;
  const auto attempt = [&](float wanted) {
    const float candidate = to_float(to_bf16(wanted));
    const Fit fit = nearest_codes(values, top, candidate, grid, tried);
    if (!(fit.error < best.error)) return;
    best = fit, scale = candidate;
    memcpy(codes, tried, 32);
  };
  for (float share : {1.f, .95f, .9f, .85f, 1.06f}) attempt(top / (grid.entries[0] * share));
  for (float share : {1.f, .94f, 1.06f}) attempt(top / (grid.entries[15] * share));
  attempt(best.scale);
  return scale;
}

// Quantizes 32 values of a column; scales are bf16, so that any magnitude has one. A value that is
// not finite makes the block NaN.
void quantize(const Weights& w, const Grid& grid, char* block, int64_t column,
              const float* values) {
  uint8_t codes[32];
  const float top = extreme(values);
  float scale = to_float(to_bf16(std::fabs(top) / 127.f));
  if (!std::isfinite(top)) {
    scale = NAN;
    std::fill(codes, codes + 32, uint8_t(w.type == INT8 ? 129 : 9));
  } else if (w.type == INT8) {
    round_codes(values, scale, codes);
  } else if (top == 0) {
    scale = 0;
    std::fill(codes, codes + 32, uint8_t(8));
  } else {
    scale = int4_scale(values, top, grid, codes);
  }
  store_scale(block, column, 0, to_bf16(scale));
  store_codes(w, block, column, codes);
}

// Packs one column, given as floats padded with zeros.
void pack_column(const Weights& w, const Grid& grid, int64_t packed_k, int64_t column,
                 const float* values) {
  for (int64_t k = 0; k < packed_k; k += K_BLOCK[w.type]) {
    char* block = block_of(w, packed_k, column, k);
    if (w.type == F32) {
      for (int i = 0; i < K_BLOCK[F32]; i++)
        memcpy(block + (i * UNIT + column % UNIT) * 4, values + k + i, 4);
    } else if (w.type == BF16) {
      char* to = block + column % UNIT / 16 * 1024 + column % 16 * 4;
      bf16 narrow[32];
      for (int i = 0; i < 32; i += W) {
        const HalfVec h = round_to_bf16(load(values + k + i));
        memcpy(narrow + i, &h, sizeof h);
      }
      for (int i = 0; i < 32; i += 2) memcpy(to + i * 32, narrow + i, 4);
    } else {
      quantize(w, grid, block, column, values + k);
    }
  }
}

}  // namespace

void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Weights& packed,
                int64_t packed_k, int64_t first, int64_t begin, int64_t end) {
  static thread_local Scratch<float> column_values;
  float* values = column_values.fit(packed_k);
  const Grid grid(packed);
  for (int64_t column = begin * UNIT; column < end * UNIT; column++) {
    const int64_t row = column - first;
    const int64_t size = row < n ? k : 0;
    if (size) widen(w, w_type, row * k, size, values);
    std::fill(values + size, values + packed_k, 0.f);
    pack_column(packed, grid, packed_k, column, values);
  }
}

void pack_codes(const Codes& codes, const Weights& packed, int64_t packed_k, int64_t first,
                int64_t begin, int64_t end) {
  const int64_t blocks = (codes.k + 31) / 32;
  const uint8_t zero = packed.type == INT8 ? 128 : 8;
  for (int64_t column = begin * UNIT; column < end * UNIT; column++) {
    const int64_t row = column - first;
    for (int64_t b = 0; b < packed_k / 32; b++) {
      const bool inside = row < codes.n && b < blocks;
      uint8_t padded[32];
      std::fill(padded, padded + 32, zero);
      if (inside)
        memcpy(padded, codes.codes + row * codes.k + b * 32,
               size_t(std::min<int64_t>(32, codes.k - b * 32)));
      char* block = block_of(packed, packed_k, column, b * 32);
      store_codes(packed, block, column, padded);
      const int64_t at = row * blocks + b;
      store_scale(block, column, 0, inside ? codes.scales[at] : 0);
      if (packed.extra) store_scale(block, column, 1, inside ? codes.extra[at] : 0);
    }
  }
}

void unpack_row(const Weights& w, int64_t packed_k, int64_t column, float* to, int64_t size) {
  const int64_t step = K_BLOCK[w.type];
  for (int64_t at = 0; at < size; at += step) {
    const char* block = block_of(w, packed_k, column, at);
    const char* codes = block + header_bytes(w);
    auto scale = [&](int place) {
      return element(block + place * SCALES, w.scale_type, column % UNIT);
    };
    for (int64_t i = 0; i < std::min(step, size - at); i++) {
      if (w.type == F32) {
        to[at + i] = element(block, F32, i * UNIT + column % UNIT);
      } else if (w.type == BF16) {
        to[at + i] = element(block + column % UNIT / 16 * 1024, BF16,
                             i / 2 * 32 + column % 16 * 2 + i % 2);
      } else {
        const float s = scale(w.extra == UPPER_SCALES && i >= 16 ? 1 : 0);
        const float value =
            w.type == INT8
                ? float(uint8_t(codes[byte_of(column, i)]) - 128)
                : w.table[uint8_t(codes[nibbles_of(column, i)]) >> i % 2 * 4 & 15] * w.factor;
        to[at + i] = value * s + (w.extra == OFFSETS ? scale(1) : 0.f);
      }
    }
  }
}

}  // namespace chunkllama
