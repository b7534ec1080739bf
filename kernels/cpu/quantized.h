// Quantized weights (int8 and int4 of linear.h) on the vector units: as floats, a few rows at a
// time, and widened to bf16 where an instruction multiplies that.
#pragma once
#include "linear.h"
#include "prefetch.h"
#include "vec.h"

namespace chunkllama {

// The weights of a unit, and where those of the next one begin.
struct Stream {
  const char *at, *end, *next;
  const Weights* format;
  INLINE const char* ahead(const char* p) const {
    constexpr long AHEAD = 8192;  // distance in bytes at which weights are prefetched
    const char* a = p + AHEAD;
    return a < end ? a : next ? next + (a - end) : p;
  }
  INLINE void prefetch(const char* p, int bytes) const {
    const char* a = ahead(p);
    for (int i = 0; i < bytes; i += 64) prefetch_l2(a + i);
  }
};

// How the blocks of quantized weights are read. PLAIN: scales in bf16 without extra values, as most
// weights have them; the inner loops then test for nothing else.
template <bool PLAIN>
struct Format {
  const Weights& w;
  INLINE bool has_offsets() const { return !PLAIN && w.extra == OFFSETS; }
  INLINE bool has_upper_scales() const { return !PLAIN && w.extra == UPPER_SCALES; }
  INLINE int header() const { return PLAIN ? SCALES : header_bytes(w); }
  // W scales, offsets or upper scales.
  INLINE Vec scales(const char* p) const {
    if (!PLAIN && w.scale_type == F16) return load_f16(reinterpret_cast<const uint16_t*>(p));
    return load(reinterpret_cast<const bf16*>(p));
  }
};
template <class F>
static INLINE void by_format(const Weights& w, F&& f) {
  if (w.extra == NO_EXTRA && w.scale_type == BF16) f(Format<true>{w});
  else f(Format<false>{w});
}
static INLINE IntVec load_words(const char* p) {
  IntVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Byte `nth` of each word times its column's scale: the byte becomes the top of the mantissa of a
// float in [128, 256), and one multiply-add removes both offsets.
// `twice` is 2 * scale, `offset` is -384 * scale plus the weights' own offset.
template <int NTH>
static INLINE Vec dequantize(IntVec words, Vec twice, Vec offset) {
  const IntVec shifted = NTH < 2 ? words << (15 - 8 * NTH) : words >> (8 * NTH - 15);
  return (Vec)((shifted & 0x7f8000) | 0x43000000) * twice + offset;
}

// The values of the 16 codes of int4.
#if defined(__AVX512F__)
class Table {
 public:
  explicit Table(const float* values) : values_((__m512)load(values)) {}
  // Values of nibble NTH of each word.
  template <int NTH>
  INLINE Vec at(IntVec words) const {
    return (Vec)_mm512_permutexvar_ps((__m512i)(words >> (4 * NTH)), values_);
  }

 private:
  __m512 values_;
};
#elif defined(__AVX2__)
class Table {
 public:
  explicit Table(const float* values)
      : lower_((__m256)load(values)), upper_((__m256)load(values + 8)) {}
  template <int NTH>
  INLINE Vec at(IntVec words) const {
    const __m256i index = (__m256i)(words >> (4 * NTH));
    const __m256 is_upper = (__m256)((IntVec)words << (28 - 4 * NTH));  // its sign bit
    return (Vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps(lower_, index),
                                 _mm256_permutevar8x32_ps(upper_, index), is_upper);
  }

 private:
  __m256 lower_, upper_;
};
#elif defined(__aarch64__)
class Table {
 public:
  explicit Table(const float* values)
      : values_(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(values))) {}
  template <int NTH>
  INLINE Vec at(IntVec words) const {
    const IntVec code = NTH ? words >> (4 * NTH) & 15 : words & 15;
    // The four bytes of entry `code`.
    return (Vec)vqtbl4q_u8(values_, (uint8x16_t)(code * 0x04040404 + 0x03020100));
  }

 private:
  uint8x16x4_t values_;
};
#else
class Table {
 public:
  explicit Table(const float* values) : values_(values) {}
  template <int NTH>
  INLINE Vec at(IntVec words) const {
    const IntVec index = (words >> (4 * NTH)) & 15;
    Vec v;
    for (int i = 0; i < W; i++) v[i] = values_[index[i]];
    return v;
  }

 private:
  const float* values_;
};
#endif

// f(0), f(1), ... f(COUNT - 1), each a constant.
template <int COUNT, class F>
static INLINE void for_each(F&& f) {
  if constexpr (COUNT > 0) {
    for_each<COUNT - 1>(f);
    f(std::integral_constant<int, COUNT - 1>{});
  }
}

// acc [R, 32] = x [R] * columns [column, column + N * W) of an int8 unit. Few
// rows have several sums for each column: one alone would wait for its last multiply-add.
template <int R, int N, class F>
static INLINE void int8_product(const float* x, long x_stride, const Stream& stream,
                                const F& format, bool prefetch, int column, float* acc) {
  const int header = format.header(), bytes = header + CODE_BYTES[INT8];
  constexpr int SUMS = R == 1 ? 4 : R == 2 ? 2 : 1;
  Vec c[R][N][SUMS] = {};
  for (const char* p = stream.at; p < stream.end; p += bytes, x += 32) {
    if (prefetch) stream.prefetch(p, bytes);
    for (int j = 0; j < N; j++) {
      const int at = column + j * W;
      Vec scale = format.scales(p + at * 2), own{};
      if (format.has_offsets()) own = format.scales(p + SCALES + at * 2);
      const char* b = p + header + at / 16 * 512 + at % 16 * 4;
      Vec twice = scale * 2.f, offset = scale * -384.f + own;
      for (int s = 0; s < 8; s++, b += 64) {
        if (s == 4 && format.has_upper_scales()) {
          scale = format.scales(p + SCALES + at * 2);
          twice = scale * 2.f, offset = scale * -384.f;
        }
        const IntVec v = load_words(b);
        for_each<4>([&](auto nth) {
          const Vec value = dequantize<nth()>(v, twice, offset);
          for (int r = 0; r < R; r++)
            c[r][j][nth() % SUMS] += value * set(x[r * x_stride + 4 * s + nth()]);
        });
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) {
      Vec total = c[r][j][0];
      for (int i = 1; i < SUMS; i++) total += c[r][j][i];
      store(acc + r * UNIT + column + j * W, total);
    }
}

// The same of int4. Values are summed over half a block before they are scaled: one instruction
// less for each vector of weights. They are within [-1, 1]: such a sum overflows only where x is
// above 1e37. An offset is multiplied by the sum of the block's x.
template <int R, int N, class F>
static INLINE void int4_product(const float* x, long x_stride, const Stream& stream,
                                const F& format, bool prefetch, int column, float* acc) {
  const Table table(format.w.table);
  const float factor = format.w.factor;
  const int header = format.header(), bytes = header + CODE_BYTES[INT4];
  Vec c[R][N] = {};
  for (const char* p = stream.at; p < stream.end; p += bytes, x += 32) {
    if (prefetch) stream.prefetch(p, bytes);
    float sums[R];
    if (format.has_offsets())
      for (int r = 0; r < R; r++) {
        Vec total{};
        for (int i = 0; i < 32; i += W) total += load(x + r * x_stride + i);
        sums[r] = sum(total);
      }
    for (int j = 0; j < N; j++) {
      const int at = column + j * W;
      const char* b = p + header + at / 16 * 256 + at % 16 * 4;
      Vec scale = format.scales(p + at * 2) * factor;
      for (int half = 0; half < 2; half++) {
        if (half && format.has_upper_scales())
          scale = format.scales(p + SCALES + at * 2) * factor;
        Vec part[R] = {};
        for (int word = 2 * half; word < 2 * half + 2; word++, b += 64) {
          const IntVec v = load_words(b);
          for_each<8>([&](auto nth) {
            const Vec value = table.at<nth()>(v);
            for (int r = 0; r < R; r++) part[r] += value * set(x[r * x_stride + 8 * word + nth()]);
          });
        }
        for (int r = 0; r < R; r++) c[r][j] += scale * part[r];
      }
      if (format.has_offsets()) {
        const Vec offset = format.scales(p + SCALES + at * 2);
        for (int r = 0; r < R; r++) c[r][j] += offset * set(sums[r]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
}

// The k blocks [at, end) of bf16, int8 or int4 as floats [k][32 columns].
static INLINE void bf16_to_floats(const char* at, const char* end, float* to) {
  for (const char* p = at; p < end; p += CODE_BYTES[BF16], to += 32 * UNIT)
    for (int column = 0; column < UNIT; column += W) {
      const bf16* b = reinterpret_cast<const bf16*>(p + column / 16 * 1024) + column % 16 * 2;
      float* value = to + column;
      for (int s = 0; s < 16; s++, b += 32, value += 2 * UNIT) {
        const IntVec pairs = load_pairs(b);
        store(value, even(pairs));
        store(value + UNIT, odd(pairs));
      }
    }
}
template <class F>
static INLINE void int8_to_floats(const F& format, const char* at, const char* end, float* to) {
  const int header = format.header(), bytes = header + CODE_BYTES[INT8];
  for (const char* p = at; p < end; p += bytes, to += 32 * UNIT)
    for (int column = 0; column < UNIT; column += W) {
      Vec scale = format.scales(p + column * 2), own{};
      if (format.has_offsets()) own = format.scales(p + SCALES + column * 2);
      const char* b = p + header + column / 16 * 512 + column % 16 * 4;
      for (int quad = 0; quad < 8; quad++, b += 64) {
        if (quad == 4 && format.has_upper_scales()) scale = format.scales(p + SCALES + column * 2);
        const Vec twice = scale * 2.f, offset = scale * -384.f + own;
        const IntVec v = load_words(b);
        for_each<4>([&](auto nth) {
          store(to + (4 * quad + nth()) * UNIT + column, dequantize<nth()>(v, twice, offset));
        });
      }
    }
}
template <class F>
static INLINE void int4_to_floats(const F& format, const char* at, const char* end, float* to) {
  const Table table(format.w.table);
  const float factor = format.w.factor;
  const int header = format.header(), bytes = header + CODE_BYTES[INT4];
  for (const char* p = at; p < end; p += bytes, to += 32 * UNIT)
    for (int column = 0; column < UNIT; column += W) {
      Vec scale = format.scales(p + column * 2) * factor, offset{};
      if (format.has_offsets()) offset = format.scales(p + SCALES + column * 2);
      const char* words = p + header + column / 16 * 256 + column % 16 * 4;
      for (int word = 0; word < 4; word++, words += 64) {
        if (word == 2 && format.has_upper_scales())
          scale = format.scales(p + SCALES + column * 2) * factor;
        const IntVec v = load_words(words);
        for_each<8>([&](auto nth) {
          store(to + (8 * word + nth()) * UNIT + column, table.at<nth()>(v) * scale + offset);
        });
      }
    }
}
static inline void widen_to_floats(const Weights& w, const char* at, const char* end, float* to) {
  switch (w.type) {
    case INT8: by_format(w, [&](auto format) { int8_to_floats(format, at, end, to); }); break;
    case INT4: by_format(w, [&](auto format) { int4_to_floats(format, at, end, to); }); break;
    default: bf16_to_floats(at, end, to);
  }
}

#if defined(BF16_PRODUCTS)
// Scales of a block's 16 columns, with what makes up for truncation: cutting a float to its upper
// half shrinks it by 2^-9 on average.
constexpr float TRUNCATED = 1.f + 1.f / 512;

// The upper halves of a and b, side by side.
static INLINE IntVec upper_halves(Vec a, Vec b) {
#if defined(__AVX512F__)
  const IntVec lower = (IntVec)_mm512_srli_epi32((__m512i)a, 16);
#else
  const IntVec lower = (IntVec)vshrq_n_u32((uint32x4_t)a, 16);
#endif
  return lower | ((IntVec)b & (int32_t)0xffff0000);
}
static INLINE void store_words(char* p, IntVec v) { memcpy(p, &v, sizeof v); }

// A k block of int8 as two bf16 tiles; the block at `next` is prefetched meanwhile.
template <class F>
static INLINE void widen_int8(const F& format, const char* from, char* tiles, const char* next) {
  const int header = format.header();
  for (int column = 0; column < UNIT; column += W) {
    const int place = column % BLOCK * 4;  // bytes from a row of 16 columns' start
    Vec scale = format.scales(from + column * 2) * TRUNCATED, own{};
    if (format.has_offsets()) own = format.scales(from + SCALES + column * 2) * TRUNCATED;
    const char* bytes = from + header + column / BLOCK * 512 + place;
    char* to = tiles + column / BLOCK * 1024 + place;
    for (int part = 0; part < 2; part++) {
      if (part && format.has_upper_scales())
        scale = format.scales(from + SCALES + column * 2) * TRUNCATED;
      const Vec twice = scale * 2.f, offset = scale * -384.f + own;
      for (int quad = 0; quad < 4; quad++, bytes += 64, to += 128) {
        if (place == 0) prefetch_l2(next + column / BLOCK * 512 + part * 256 + quad * 64);
        const IntVec v = load_words(bytes);
        store_words(to, upper_halves(dequantize<0>(v, twice, offset),
                                     dequantize<1>(v, twice, offset)));
        store_words(to + 64, upper_halves(dequantize<2>(v, twice, offset),
                                          dequantize<3>(v, twice, offset)));
      }
    }
  }
}

// The same of int4.
template <class F>
static INLINE void widen_int4(const F& format, const Table& table, const char* from, char* tiles,
                              const char* next) {
  const int header = format.header();
  const float factor = format.w.factor * TRUNCATED;
  for (int column = 0; column < UNIT; column += W) {
    const int place = column % BLOCK * 4;
    Vec scale = format.scales(from + column * 2) * factor, offset{};
    if (format.has_offsets()) offset = format.scales(from + SCALES + column * 2) * TRUNCATED;
    const char* words = from + header + column / BLOCK * 256 + place;
    char* to = tiles + column / BLOCK * 1024 + place;
    for (int word = 0; word < 4; word++, words += 64, to += 256) {
      if (word == 2 && format.has_upper_scales())
        scale = format.scales(from + SCALES + column * 2) * factor;
      if (place == 0) prefetch_l2(next + column / BLOCK * 256 + word * 64);
      const IntVec v = load_words(words);
      for_each<4>([&](auto pair) {
        const Vec a = table.at<2 * pair()>(v) * scale + offset;
        const Vec b = table.at<2 * pair() + 1>(v) * scale + offset;
        store_words(to + pair() * 64, upper_halves(a, b));
      });
    }
  }
}

template <Type TYPE>
static INLINE void widen(const Weights& w, const char* from, char* tiles, const char* next) {
  by_format(w, [&](auto format) {
    if constexpr (TYPE == INT4) widen_int4(format, Table(w.table), from, tiles, next);
    else widen_int8(format, from, tiles, next);
  });
}

// Blocks of k of a unit as bf16 tiles.
static INLINE Stream widen_unit(const Stream& s, char* tiles) {
  static const Weights WIDE{nullptr, 0, BF16, BF16, NO_EXTRA, 1.f, nullptr, nullptr, 0};
  const Weights& w = *s.format;
  const int bytes = block_bytes(w);
  char* to = tiles;
  for (const char* p = s.at; p < s.end; p += bytes, to += CODE_BYTES[BF16])
    if (w.type == INT4) widen<INT4>(w, p, to, s.ahead(p));
    else widen<INT8>(w, p, to, s.ahead(p));
  return {tiles, to, nullptr, &WIDE};
}
#endif

}  // namespace chunkllama
