#include "linear.h"

#include <algorithm>
#include <cmath>

#include "tiles.h"
#include "vec.h"

namespace chunkllama {
namespace {

constexpr int MAX_ROWS = 32;               // rows of one block product
constexpr long AHEAD = 4096;               // bytes that the prefetch of the weights runs ahead
constexpr int K_BYTES = 2048;              // one k block of a unit: 32 k of bf16, 64 of int8, 16 of fp32
constexpr int K_BLOCK[] = {16, 32, 64};    // by Type

// The weights of a unit, and where the stream goes on behind them.
struct Stream {
  const char *at, *end, *next;
  INLINE void prefetch(const char* p) const {
    const char* ahead = p + AHEAD;
    if (ahead >= end) {
      if (!next) return;
      ahead = next + (ahead - end);
    }
    for (int i = 0; i < K_BYTES; i += 64) prefetch_l2(ahead + i);
  }
};

#if defined(__AMX_TILE__)
// acc [16 * ROW_TILES, 32] = x * unit, in float or int32.
template <bool INT8_WEIGHTS, int ROW_TILES>
INLINE void tile_product(const char* x, long x_bytes, const Stream& w, bool prefetch, float* acc) {
#define DOT(c, a, b)               \
  if (INT8_WEIGHTS) {              \
    TILE_DOT_INT8(c, a, b);        \
  } else {                         \
    TILE_DOT_BF16(c, a, b);        \
  }
  TILE_ZERO(0);
  TILE_ZERO(1);
  if (ROW_TILES == 2) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (const char* p = w.at; p < w.end; p += K_BYTES, x += 64) {
    if (prefetch) w.prefetch(p);
    TILE_LOAD(4, x, x_bytes);
    TILE_LOAD(6, p, 64);
    DOT(0, 4, 6);
    TILE_LOAD(7, p + 1024, 64);
    DOT(1, 4, 7);
    if (ROW_TILES == 2) {
      TILE_LOAD(5, x + 16 * x_bytes, x_bytes);
      DOT(2, 5, 6);
      DOT(3, 5, 7);
    }
  }
  constexpr long stride = UNIT * 4;
  TILE_STORE(0, acc, stride);
  TILE_STORE(1, acc + 16, stride);
  if (ROW_TILES == 2) {
    TILE_STORE(2, acc + 16 * UNIT, stride);
    TILE_STORE(3, acc + 16 * UNIT + 16, stride);
  }
#undef DOT
}
#endif

#if defined(__AVX512F__)
constexpr int BLOCKS = 2, VECTOR_ROWS = 8;  // column blocks and rows of one inner loop
#elif defined(__AVX2__)
constexpr int BLOCKS = 1, VECTOR_ROWS = 5;
#else
constexpr int BLOCKS = 1, VECTOR_ROWS = 2;
#endif
constexpr int N = BLOCKS * 16 / W;

// acc [R, 32] = x [R] * columns [column, column + 16 * BLOCKS) of the unit, in float.
template <Type TYPE, int R>
INLINE void vector_product(const float* x, long x_stride, const Stream& w, bool prefetch, int column, float* acc) {
  Vec c[R][N] = {};
  for (const char* p = w.at; p < w.end; p += K_BYTES) {
    if (prefetch) w.prefetch(p);
    for (int s = 0; s < 16; s++) {
      if constexpr (TYPE == F32) {
        const float* b = reinterpret_cast<const float*>(p) + s * UNIT + column;
        for (int j = 0; j < N; j++) {
          const Vec v = load(b + j * W);
          for (int r = 0; r < R; r++) c[r][j] += v * set(x[r * x_stride + s]);
        }
      } else if constexpr (TYPE == BF16) {
        for (int j = 0; j < N; j++) {
          const int at = column + j * W;
          const IntVec v = load_pairs(reinterpret_cast<const bf16*>(p + at / 16 * 1024) + s * 32 + at % 16 * 2);
          for (int r = 0; r < R; r++) c[r][j] += even(v) * set(x[r * x_stride + 2 * s]);
          for (int r = 0; r < R; r++) c[r][j] += odd(v) * set(x[r * x_stride + 2 * s + 1]);
        }
      } else {
        for (int j = 0; j < N; j++) {
          const int at = column + j * W;
          IntVec v;
          memcpy(&v, p + at / 16 * 1024 + s * 64 + at % 16 * 4, sizeof v);
          for (int k = 0; k < 4; k++) {
            const Vec b = __builtin_convertvector((v << (24 - 8 * k)) >> 24, Vec);
            for (int r = 0; r < R; r++) c[r][j] += b * set(x[r * x_stride + 4 * s + k]);
          }
        }
      }
    }
    x += K_BLOCK[TYPE];
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
}

#if defined(__AVX512VNNI__) && !defined(__AMX_TILE__)
// acc [R, 32] (int32) = x [R] * unit. The instruction wants x unsigned: 128 is added here and taken out by column_sums.
template <int R>
INLINE void dot_product(const int8_t* x, long x_stride, const Stream& w, bool prefetch, const int32_t* column_sums, float* acc) {
  __m512i c[R][2] = {};
  for (const char* p = w.at; p < w.end; p += K_BYTES, x += 64) {
    if (prefetch) w.prefetch(p);
    for (int s = 0; s < 16; s++) {
      const __m512i b[2] = {_mm512_loadu_si512(p + s * 64), _mm512_loadu_si512(p + 1024 + s * 64)};
      for (int r = 0; r < R; r++) {
        int32_t quad;
        memcpy(&quad, x + r * x_stride + s * 4, 4);
        const __m512i a = _mm512_set1_epi32(quad ^ (int32_t)0x80808080);
        for (int j = 0; j < 2; j++) c[r][j] = _mm512_dpbusd_epi32(c[r][j], a, b[j]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) {
      const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(column_sums + j * 16), 7);
      _mm512_storeu_si512(acc + r * UNIT + j * 16, _mm512_sub_epi32(c[r][j], excess));
    }
}
#endif

// Runs f with the number of rows as a constant, block of rows by block of rows.
template <class F>
INLINE void by_rows(int rows, F&& f) {
  for (int r = 0; r < rows;) {
    const int n = std::min(VECTOR_ROWS, rows - r);
    switch (n) {
      case 1: f(r, std::integral_constant<int, 1>{}); break;
#if defined(__AVX2__)
      case 2: f(r, std::integral_constant<int, 2>{}); break;
      case 3: f(r, std::integral_constant<int, 3>{}); break;
      case 4: f(r, std::integral_constant<int, 4>{}); break;
#endif
#if defined(__AVX512F__)
      case 5: f(r, std::integral_constant<int, 5>{}); break;
      case 6: f(r, std::integral_constant<int, 6>{}); break;
      case 7: f(r, std::integral_constant<int, 7>{}); break;
#endif
      default: f(r, std::integral_constant<int, VECTOR_ROWS>{});
    }
    r += n;
  }
}

template <Type TYPE>
void vector_block(const LinearArgs& a, int64_t first, int rows, const Stream& w, bool prefetch, float* acc) {
  const float* x = static_cast<const float*>(a.x) + first * a.x_stride;
  for (int column = 0; column < UNIT; column += 16 * BLOCKS)
    by_rows(rows, [&](int r, auto n) {
      vector_product<TYPE, decltype(n)::value>(x + r * a.x_stride, a.x_stride, w, prefetch && r == 0, column, acc + r * UNIT);
    });
}

// acc [rows, 32] = rows [first, first + rows) of x times the unit: int32 if both are int8, else float.
void block_product(const LinearArgs& a, int64_t unit, int64_t first, int rows, const Stream& w, bool prefetch, float* acc) {
  const Type type = Type(a.linear->type);
#if defined(__AMX_TILE__)
  if (type != F32) {
    const long bytes = a.x_stride * (type == BF16 ? 2 : 1);
    const char* x = static_cast<const char*>(a.x) + first * bytes;
    if (type == BF16 && rows > 16) tile_product<false, 2>(x, bytes, w, prefetch, acc);
    else if (type == BF16) tile_product<false, 1>(x, bytes, w, prefetch, acc);
    else if (rows > 16) tile_product<true, 2>(x, bytes, w, prefetch, acc);
    else tile_product<true, 1>(x, bytes, w, prefetch, acc);
    return;
  }
#elif defined(__AVX512VNNI__)
  if (type == INT8) {
    const int8_t* x = static_cast<const int8_t*>(a.x) + first * a.x_stride;
    by_rows(rows, [&](int r, auto n) {
      dot_product<decltype(n)::value>(x + r * a.x_stride, a.x_stride, w, prefetch && r == 0, a.linear->column_sums + unit * UNIT,
                                      acc + r * UNIT);
    });
    return;
  }
#endif
  (void)unit;
  if (type == F32) vector_block<F32>(a, first, rows, w, prefetch, acc);
  else if (type == BF16) vector_block<BF16>(a, first, rows, w, prefetch, acc);
  else vector_block<INT8>(a, first, rows, w, prefetch, acc);
}

// One row of the product as floats, scaled and with its bias: [32], in place.
INLINE void finish_row(const LinearArgs& a, int64_t row, int64_t column, float* acc) {
  const Linear& l = *a.linear;
  for (int j = 0; j < UNIT; j += W) {
    Vec v = load(acc + j);
    if (l.type == INT8) {
      if (QUANTIZES_ACTIVATIONS) v = __builtin_convertvector((IntVec)v, Vec) * a.row_scale[row];
      v *= load(l.scale + column + j);
    }
    if (l.bias) v += load(l.bias + column + j);
    store(acc + j, v);
  }
}

template <class Y>
INLINE void write_row(Epilogue epilogue, Y* y, int64_t column, const float* acc) {
  if (epilogue == SILU_AND_MUL) {
    for (int j = 0; j < 16; j += W) store(y + column / 2 + j, silu(load(acc + j)) * load(acc + 16 + j));
  } else {
    for (int j = 0; j < UNIT; j += 2 * W) store(y + column + j, load(acc + j), load(acc + j + W));
  }
}

void run_unit(const LinearArgs& a, int64_t unit, const Stream& w) {
  alignas(64) float acc[MAX_ROWS * UNIT];
  const int64_t column = unit * UNIT;
  const bool plain = a.linear->type != INT8 && !a.linear->bias;
  for (int64_t first = 0; first < a.rows; first += MAX_ROWS) {
    const int rows = int(std::min<int64_t>(MAX_ROWS, a.rows - first));
    block_product(a, unit, first, rows, w, first == 0, acc);
    for (int r = 0; r < rows; r++) {
      float* from = acc + r * UNIT;
      if (!plain) finish_row(a, first + r, column, from);
      const int64_t at = (first + r) * a.y_stride;
      if (a.epilogue == ADD) {
        float* y = static_cast<float*>(a.y) + at + column;
        for (int j = 0; j < UNIT; j += W) store(y + j, load(y + j) + load(from + j));
      } else if (a.y_type == BF16) {
        write_row(a.epilogue, static_cast<bf16*>(a.y) + at, column, from);
      } else {
        write_row(a.epilogue, static_cast<float*>(a.y) + at, column, from);
      }
    }
  }
}

INLINE float element(const void* w, int32_t type, int64_t i) {
  return type == BF16 ? to_float(static_cast<const bf16*>(w)[i]) : static_cast<const float*>(w)[i];
}

// Where element (column, k) of a packed weight lies.
INLINE int64_t packed_index(const Linear& l, int64_t column, int64_t k) {
  const int64_t unit = column / UNIT * UNIT * l.k, half = column % UNIT / 16, c = column % 16;
  if (l.type == F32) return unit + k * UNIT + column % UNIT;
  const int64_t group = l.type == BF16 ? 2 : 4, block = 16 * group;
  return unit + k / block * 2 * 16 * block + half * 16 * block + k % block / group * block + c * group + k % group;
}

}  // namespace

void linear_units(const LinearArgs& args, Counter& next, int threads) {
  [[maybe_unused]] Tiles tiles;
  const Linear& l = *args.linear;
  const int64_t units = l.n / UNIT, bytes = l.k / K_BLOCK[l.type] * K_BYTES;
  const int64_t grain = std::max<int64_t>(1, units / (16 * threads));
  const char* weight = static_cast<const char*>(l.weight);
  int64_t begin = next.take(grain);
  while (begin < units) {
    const int64_t following = next.take(grain), end = std::min(begin + grain, units);
    for (int64_t u = begin; u < end; u++) {
      const char *at = weight + u * bytes, *behind = at + bytes;
      const char* then = u + 1 < end ? behind : following < units ? weight + following * bytes : nullptr;
      run_unit(args, u, {at, behind, then});
    }
    begin = following;
  }
}

void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Linear& packed, int64_t begin, int64_t end) {
  for (int64_t column = begin * UNIT; column < end * UNIT; column++) {
    auto value = [&](int64_t i) { return column < n && i < k ? element(w, w_type, column * k + i) : 0.f; };
    if (packed.type == INT8) {
      float top = 0;
      for (int64_t i = 0; i < k; i++) top = std::max(top, std::fabs(value(i)));
      const float inverse = top > 0 ? 127.f / top : 0.f;
      int32_t total = 0;
      for (int64_t i = 0; i < packed.k; i++) {
        const int8_t q = int8_t(std::lrint(value(i) * inverse));
        total += q;
        static_cast<int8_t*>(const_cast<void*>(packed.weight))[packed_index(packed, column, i)] = q;
      }
      const_cast<float*>(packed.scale)[column] = top / 127.f;
      const_cast<int32_t*>(packed.column_sums)[column] = total;
      continue;
    }
    for (int64_t i = 0; i < packed.k; i++) {
      const int64_t at = packed_index(packed, column, i);
      void* to = const_cast<void*>(packed.weight);
      if (packed.type == BF16) static_cast<bf16*>(to)[at] = to_bf16(value(i));
      else static_cast<float*>(to)[at] = value(i);
    }
  }
}

void unpack_row(const Linear& packed, int64_t column, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i++) to[i] = element(packed.weight, packed.type, packed_index(packed, column, i));
}

}  // namespace chunkllama
