// int4 weights times 8-bit activations, for few rows: four products of bytes are summed at a time.
// Activations are rounded with a scale for each row and 32 k, which costs little beside rounding
// the weights to 4 bits.
#pragma once
#include <cmath>

#include "quantized.h"

namespace chunkllama {

#if defined(__AVX2__) || defined(__aarch64__)
#define QUAD_PRODUCTS 1

#if defined(__AVX512VNNI__)
constexpr int QUAD_OFFSET = 128;  // the instruction takes weights without a sign
#else
constexpr int QUAD_OFFSET = 0;
#endif

// 32 activations of a row, as quad_product reads them.
struct alignas(64) QuadBlock {
  int32_t quads[8];  // of 8 k each two: bytes 0, 2, 4, 6, then 1, 3, 5, 7
  float scale, sum;  // of the 32 values
  int32_t start[3];  // -QUAD_OFFSET times the sum of all bytes, of the lower and of the upper 16
};

// Bytes 0, 2, 4, 6 of eight.
static INLINE int32_t even_bytes(uint64_t x) {
  x &= 0x00ff00ff00ff00ff;
  x = (x | x >> 8) & 0x0000ffff0000ffff;
  return int32_t(uint32_t(x | x >> 16));
}

// 32 values that are not all finite make the block NaN.
static INLINE QuadBlock quantize_block(const float* x) {
  QuadBlock block;
  Vec top{}, total{};
  IntVec broken{};
  for (int i = 0; i < 32; i += W) {
    const Vec v = load(x + i);
    broken |= ~(v - v == 0.f);
    top = max(max(v, -v), top);
    total += v;
  }
  const float largest_value = largest(top), scale = largest_value / 127.f;
  const float inverse = 1.f / scale;
  const bool is_tiny = !(inverse < INFINITY);  // zero, or too small to divide by
  const Vec factor = set(is_tiny ? 0.f : inverse), magic = set(12582912.f);  // 1.5 * 2^23
  const bool is_broken = any(broken);
  alignas(64) int8_t bytes[32];
  int32_t halves[2] = {};
  for (int i = 0; i < 32; i += W) {
    const IntVec q = is_broken ? IntVec{} : (IntVec)(load(x + i) * factor + magic) - (IntVec)magic;
    const ByteVec narrow = __builtin_convertvector(q, ByteVec);
    memcpy(bytes + i, &narrow, sizeof narrow);
    if (QUAD_OFFSET) halves[i / 16] += int32_t(sum(__builtin_convertvector(q, Vec)));
  }
  for (int word = 0; word < 4; word++) {
    uint64_t eight;
    memcpy(&eight, bytes + 8 * word, 8);
    block.quads[2 * word] = even_bytes(eight);
    block.quads[2 * word + 1] = even_bytes(eight >> 8);
  }
  block.scale = is_broken ? NAN : scale;
  block.sum = sum(total);
  block.start[0] = -QUAD_OFFSET * (halves[0] + halves[1]);
  block.start[1] = -QUAD_OFFSET * halves[0];
  block.start[2] = -QUAD_OFFSET * halves[1];
  return block;
}

// The values of the 16 codes of int4 as bytes, 128 times as large as those of `table`.
class ByteTable {
 public:
  explicit ByteTable(const int8_t* values) {
    alignas(16) uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = uint8_t(values[i] + QUAD_OFFSET);
#if defined(__AVX512F__)
    values_ = (IntVec)_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
    values_ = (IntVec)_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes));
#else
    memcpy(&values_, bytes, sizeof values_);
#endif
  }
  // Of the lower nibble of each byte.
  INLINE IntVec at(IntVec codes) const {
    const IntVec index = codes & 0x0f0f0f0f;
#if defined(__AVX512F__)
    return (IntVec)_mm512_shuffle_epi8((__m512i)values_, (__m512i)index);
#elif defined(__AVX2__)
    return (IntVec)_mm256_shuffle_epi8((__m256i)values_, (__m256i)index);
#else
    return (IntVec)vqtbl1q_u8((uint8x16_t)values_, (uint8x16_t)index);
#endif
  }

 private:
  IntVec values_;
};

// sum + the four products of bytes in each lane.
static INLINE IntVec add_quads(IntVec sum, IntVec weights, IntVec x) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512F__)
  // Two products of bytes up to 128 and 127 fit 16 bits.
  const __m512i w = (__m512i)weights, zero = _mm512_setzero_si512();
  const __m512i signed_x =
      _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask(w), zero, (__m512i)x);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
  return sum + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i w = (__m256i)weights;
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8((__m256i)x, w));
  return sum + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (IntVec)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, (int8x16_t)x);
#else
  const int8x16_t w = (int8x16_t)weights, y = (int8x16_t)x;
  const int32x4_t lower = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(y)));
  return sum + (IntVec)vpaddq_s32(lower, vpaddlq_s16(vmull_high_s8(w, y)));
#endif
}

// acc [R, 32] = R rows of blocks, `x_stride` blocks apart, * columns [column, column + N * W) of an
// int4 unit.
template <int R, int N, class F>
static INLINE void quad_product(const QuadBlock* x, long x_stride, const Stream& stream,
                                const F& format, bool prefetch, int column, float* acc) {
  const ByteTable table(format.w.bytes);
  const int header = format.header(), bytes = header + CODE_BYTES[INT4];
  const bool is_split = format.has_upper_scales();
  const float factor = format.w.factor / 128.f;
  Vec c[R][N] = {};
  for (const char* p = stream.at; p < stream.end; p += bytes, x++) {
    if (prefetch) stream.prefetch(p, bytes);
    for (int j = 0; j < N; j++) {
      const int at = column + j * W;
      const char* b = p + header + at / 16 * 256 + at % 16 * 4;
      Vec scale = format.scales(p + at * 2) * factor;
      IntVec part[R];
      for (int r = 0; r < R; r++) part[r] = set(x[r * x_stride].start[is_split]);
      for (int word = 0; word < 4; word++, b += 64) {
        if (word == 2 && is_split) {
          for (int r = 0; r < R; r++) {
            const QuadBlock& block = x[r * x_stride];
            c[r][j] += __builtin_convertvector(part[r], Vec) * (scale * set(block.scale));
            part[r] = set(block.start[2]);
          }
          scale = format.scales(p + SCALES + at * 2) * factor;
        }
        const IntVec v = load_words(b), even = table.at(v), odd = table.at(v >> 4);
        for (int r = 0; r < R; r++) {
          const int32_t* quads = x[r * x_stride].quads + 2 * word;
          part[r] = add_quads(part[r], even, set(quads[0]));
          part[r] = add_quads(part[r], odd, set(quads[1]));
        }
      }
      for (int r = 0; r < R; r++)
        c[r][j] += __builtin_convertvector(part[r], Vec) * (scale * set(x[r * x_stride].scale));
      if (format.has_offsets()) {
        const Vec offset = format.scales(p + SCALES + at * 2);
        for (int r = 0; r < R; r++) c[r][j] += offset * set(x[r * x_stride].sum);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
}
#endif

}  // namespace chunkllama
