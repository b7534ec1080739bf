// Vectors of floats as wide as the instruction set this unit is compiled for: GCC vector
// extensions, so that AVX512, AVX2, NEON and the portable baseline share one source; intrinsics
// only where the extensions lack an operation.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// An instruction multiplies pairs of bf16 and adds both products to a float.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BF16_PRODUCTS 1
#endif

namespace chunkllama {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int BLOCK = 16;  // tokens or columns per block of a packed layout, for any W

typedef uint16_t bf16;
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));
typedef int8_t ByteVec __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

static INLINE Vec set(float x) { return x - Vec{}; }
static INLINE IntVec set(int32_t x) { return x - IntVec{}; }

static INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static INLINE Vec load(const bf16* p) {
  HalfVec h;
  memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, IntVec) << 16);
}
// W bytes as floats. gcc converts such vectors element by element unless an instruction is named.
static INLINE Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i b;
  memcpy(&b, p, W);
  const IntVec wide = (IntVec)_mm512_cvtepi8_epi32(b);
#elif defined(__AVX2__)
  const IntVec wide = (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__aarch64__)
  int32_t four;
  memcpy(&four, p, W);
  const IntVec wide = (IntVec)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(uint32_t(four)))));
#elif defined(__SSE2__)
  int32_t four;
  memcpy(&four, p, W);
  const __m128i b = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(b, b);
  const IntVec wide = (IntVec)_mm_unpacklo_epi16(twice, twice) >> 24;
#else
  ByteVec b;
  memcpy(&b, p, sizeof b);
  const IntVec wide = __builtin_convertvector(b, IntVec);
#endif
  return __builtin_convertvector(wide, Vec);
}
// W half-precision floats.
static INLINE Vec load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  __m256i h;
  memcpy(&h, p, sizeof h);
  return (Vec)_mm512_cvtph_ps(h);
#elif defined(__F16C__)
  __m128i h;
  memcpy(&h, p, sizeof h);
  return (Vec)_mm256_cvtph_ps(h);
#elif defined(__aarch64__)
  float16x4_t h;
  memcpy(&h, p, sizeof h);
  return (Vec)vcvt_f32_f16(h);
#else
  HalfVec h;
  memcpy(&h, p, sizeof h);
  const IntVec bits = __builtin_convertvector(h, IntVec), magnitude = (bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias, for subnormal values too.
  const IntVec finite = (IntVec)((Vec)magnitude * 5.192296858534828e33f);
  const IntVec value = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return (Vec)(value | (bits & 0x8000) << 16);
#endif
}
// W pairs of 16-bit values: the even ones, then the odd ones, as floats.
static INLINE IntVec load_pairs(const bf16* p) {
  IntVec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static INLINE Vec even(IntVec pairs) { return (Vec)(pairs << 16); }
static INLINE Vec odd(IntVec pairs) { return (Vec)(pairs & set((int32_t)0xffff0000)); }

#if defined(BF16_PRODUCTS)
// One pair, in every lane.
static INLINE IntVec set_pair(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return set(pair);
}
// sum + a.even * b.even + a.odd * b.odd, lane by lane; subnormal values count as zero.
static INLINE Vec add_pairs(Vec sum, IntVec a, IntVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}
#endif

static INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

static INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < W; i++) bits |= mask[i];
  return bits != 0;
#endif
}

// Round to nearest even; NaN stays NaN.
static INLINE bf16 to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return (bf16)(u >> 16 | 0x40);
  return (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static INLINE float to_float(bf16 x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static INLINE float to_float(float x) { return x; }

// The same of a vector, subnormal values included.
static INLINE HalfVec round_to_bf16(Vec v) {
  const IntVec u = (IntVec)v;
  const IntVec rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const IntVec quiet = (u >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? rounded : quiet, HalfVec);
}

// Subnormal values may become zero.
static INLINE void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#elif defined(BF16_PRODUCTS)
  const bfloat16x4_t h = vcvt_bf16_f32((float32x4_t)v);
#else
  const HalfVec h = round_to_bf16(v);
#endif
  memcpy(p, &h, sizeof h);
}

// Two neighbouring vectors.
static INLINE void store(float* p, Vec a, Vec b) {
  store(p, a);
  store(p + W, b);
}
static INLINE void store(bf16* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  memcpy(p, &h, sizeof h);
#else
  store(p, a);
  store(p + W, b);
#endif
}

// The larger of two; where either is NaN, b (so keep the data in b if NaN must survive).
static INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)v);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}
static INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

static INLINE IntVec lanes() {
  IntVec v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}
// x in the first `count` lanes, `other` in the rest.
static INLINE Vec first_lanes(int count, Vec x, Vec other) {
  return lanes() < set((int32_t)count) ? x : other;
}

// 2^x; -inf gives 0, NaN stays NaN. Relative error 7.5e-5 (Coarse: 25 times below bf16's rounding)
// or 2e-7.
enum Precision { COARSE, FINE };
template <Precision P>
static INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
#else
  const IntVec underflow = x <= -126.f;
  x = max(set(-126.f), x);
  const Vec magic =
      set(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec t = (x - 0.5f) + magic;
  const Vec f = x - (t - magic);  // in [0, 1]
#endif
  Vec p;
  if (P == COARSE) {
    p = f * 0.0780245226f + 0.226067155f;
    p = p * f + 0.69583354f;
    p = p * f + 0.999925219f;
  } else {
    p = f * 2.17022539e-4f + 1.24396883e-3f;
    p = p * f + 9.67884095e-3f;
    p = p * f + 5.54833420e-2f;
    p = p * f + 2.40229836e-1f;
    p = p * f + 6.93146984e-1f;
    p = p * f + 1.0f;
  }
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return underflow ? Vec{} : p * (Vec)(((IntVec)t - (IntVec)magic + 127) << 23);
#endif
}

// 1 / x for x in [1, 2^126]; the relative error of COARSE is 6.1e-5.
template <Precision P>
static INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  if (P == COARSE) return (Vec)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.f / x;
}

// tanh(x); relative error 3e-7, NaN stays NaN.
static INLINE Vec tanh(Vec x) {
  // Near 0 the quotient below would lose digits: the Taylor series up to x^11.
  const Vec x2 = x * x;
  Vec near = x2 * -8.86323553e-3f + 2.18694885e-2f;
  near = near * x2 - 5.39682540e-2f;
  near = near * x2 + 1.33333333e-1f;
  near = near * x2 - 3.33333333e-1f;
  near = near * x2 * x + x;
  Vec e = x * 2.88539008f;
  e = e > 126.f ? set(126.f) : e;
  return x2 < 0.16f ? near : 1.f - 2.f / (exp2<FINE>(e) + 1.f);
}

// x / (1 + e^-x)
template <Precision P>
static INLINE Vec silu(Vec x) {
  const Vec e = x * -1.44269504f;
  return x * reciprocal<P>(exp2<P>(e < 126.f ? e : set(126.f)) + 1.f);
}

static INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace chunkllama
