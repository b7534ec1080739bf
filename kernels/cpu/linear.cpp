#include "linear.h"

#include <algorithm>
#include <cmath>

#include "scratch.h"
#include "tiles.h"
#include "vec.h"

namespace chunkllama {
namespace {

constexpr int MAX_ROWS = 32;               // rows of one block product
constexpr long AHEAD = 8192;               // bytes that the prefetch of the weights runs ahead
constexpr int64_t PANEL = 512;             // rows of x that stay in L2 while the weights pass by
constexpr int64_t DEEP = 18;               // k blocks of 2 KB that stay in L1 while the rows of a panel pass by
constexpr int TILE_PAIR = 2048;            // bytes of a k block of bf16: two tiles
constexpr int SCALES = 64;                 // bytes of the scales before a k block of int8
constexpr int K_BLOCK[] = {16, 32, 32};    // k per block of a unit, by Type
constexpr int K_BYTES[] = {2048, 2048, SCALES + 1024};
#if defined(__AMX_TILE__)
constexpr int FEW_ROWS = 2;                // int8 weights: with so few rows converting them to tiles does not pay
#endif

// The weights of a unit, and where the stream goes on behind them.
struct Stream {
  const char *at, *end, *next;
  INLINE const char* ahead(const char* p) const {
    const char* a = p + AHEAD;
    return a < end ? a : next ? next + (a - end) : p;
  }
  INLINE void prefetch(const char* p, int bytes) const {
    const char* a = ahead(p);
    for (int i = 0; i < bytes; i += 64) prefetch_l2(a + i);
  }
};

// Byte `nth` of each word (u = w + 128) times its column's scale: the byte becomes the top of the mantissa of a float in
// [128, 256), and one multiply-add takes both offsets out. `twice` is 2 * scale, `offset` -384 * scale.
template <int NTH>
INLINE Vec dequantize(IntVec words, Vec twice, Vec offset) {
  const IntVec shifted = NTH < 2 ? words << (15 - 8 * NTH) : words >> (8 * NTH - 15);
  return (Vec)((shifted & 0x7f8000) | 0x43000000) * twice + offset;
}

#if defined(__AMX_TILE__)
// A k block of int8 as two bf16 tiles, while the block at `next` is prefetched line by line. Cutting off the low half of a
// float shrinks it by 2^-9 on average, which the scale makes up.
INLINE void widen(const char* from, char* tiles, const char* next) {
  for (int half = 0; half < 2; half++) {
    const Vec scale = load(reinterpret_cast<const bf16*>(from) + half * 16) * (1.f + 1.f / 512);
    const Vec twice = scale * 2.f, offset = scale * -384.f;
    const char* bytes = from + SCALES + half * 512;
    for (int quad = 0; quad < 8; quad++, bytes += 64, tiles += 128) {
      prefetch_l2(next + half * 512 + quad * 64);
      IntVec v;
      memcpy(&v, bytes, sizeof v);
      auto pair = [](Vec a, Vec b) { return (IntVec)_mm512_srli_epi32((__m512i)a, 16) | ((IntVec)b & (int32_t)0xffff0000); };
      const IntVec first = pair(dequantize<0>(v, twice, offset), dequantize<1>(v, twice, offset));
      const IntVec second = pair(dequantize<2>(v, twice, offset), dequantize<3>(v, twice, offset));
      memcpy(tiles, &first, sizeof first);
      memcpy(tiles + 64, &second, sizeof second);
    }
  }
}

// A whole unit as bf16 tiles.
void widen_unit(const Stream& w, char* tiles) {
  for (const char* p = w.at; p < w.end; p += K_BYTES[INT8], tiles += TILE_PAIR) widen(p, tiles, w.ahead(p));
}

// acc [16 * ROW_TILES, 32] (+)= x * unit. int8 is widened one k block ahead of its use, through a buffer that stays in L1.
// Where many rows pass by (STREAM), x is loaded with the hint that keeps it out of L1: that belongs to the unit.
template <bool WIDEN, int ROW_TILES, bool STREAM>
INLINE void tile_product(const char* x, long x_bytes, const Stream& w, bool prefetch, bool accumulate, float* acc) {
  constexpr int bytes = WIDEN ? K_BYTES[INT8] : K_BYTES[BF16];
  constexpr long stride = UNIT * 4;
  alignas(64) char ahead[WIDEN ? 2 * TILE_PAIR : 64];
  if (WIDEN) widen(w.at, ahead, w.ahead(w.at));
  int turn = 0;
  if (accumulate) {
    TILE_LOAD(0, acc, stride);
    TILE_LOAD(1, acc + 16, stride);
    if (ROW_TILES == 2) {
      TILE_LOAD(2, acc + 16 * UNIT, stride);
      TILE_LOAD(3, acc + 16 * UNIT + 16, stride);
    }
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (const char* p = w.at; p < w.end; p += bytes, x += 64) {
    if (!WIDEN && prefetch) w.prefetch(p, bytes);
    const char* tiles = p;
    if (WIDEN) {
      tiles = ahead + turn * TILE_PAIR;
      turn ^= 1;
      if (p + bytes < w.end) widen(p + bytes, ahead + turn * TILE_PAIR, w.ahead(p + bytes));
    }
    if (STREAM) {
      TILE_LOAD_STREAM(4, x, x_bytes);
    } else {
      TILE_LOAD(4, x, x_bytes);
    }
    TILE_LOAD(6, tiles, 64);
    TILE_DOT_BF16(0, 4, 6);
    TILE_LOAD(7, tiles + 1024, 64);
    TILE_DOT_BF16(1, 4, 7);
    if (ROW_TILES == 2) {
      if (STREAM) {
        TILE_LOAD_STREAM(5, x + 16 * x_bytes, x_bytes);
      } else {
        TILE_LOAD(5, x + 16 * x_bytes, x_bytes);
      }
      TILE_DOT_BF16(2, 5, 6);
      TILE_DOT_BF16(3, 5, 7);
    }
  }
  TILE_STORE(0, acc, stride);
  TILE_STORE(1, acc + 16, stride);
  if (ROW_TILES == 2) {
    TILE_STORE(2, acc + 16 * UNIT, stride);
    TILE_STORE(3, acc + 16 * UNIT + 16, stride);
  }
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
  for (const char* p = w.at; p < w.end; p += K_BYTES[TYPE], x += K_BLOCK[TYPE]) {
    if (prefetch) w.prefetch(p, K_BYTES[TYPE]);
    for (int j = 0; j < N; j++) {
      const int at = column + j * W;
      if constexpr (TYPE == F32) {
        const float* b = reinterpret_cast<const float*>(p) + at;
        for (int s = 0; s < 16; s++, b += UNIT)
          for (int r = 0; r < R; r++) c[r][j] += load(b) * set(x[r * x_stride + s]);
      } else if constexpr (TYPE == BF16) {
        const bf16* b = reinterpret_cast<const bf16*>(p + at / 16 * 1024) + at % 16 * 2;
        for (int s = 0; s < 16; s++, b += 32) {
          const IntVec v = load_pairs(b);
          for (int r = 0; r < R; r++) c[r][j] += even(v) * set(x[r * x_stride + 2 * s]);
          for (int r = 0; r < R; r++) c[r][j] += odd(v) * set(x[r * x_stride + 2 * s + 1]);
        }
      } else {
        const Vec scale = load(reinterpret_cast<const bf16*>(p) + at), twice = scale * 2.f, offset = scale * -384.f;
        const char* b = p + SCALES + at / 16 * 512 + at % 16 * 4;
        for (int s = 0; s < 8; s++, b += 64) {
          IntVec v;
          memcpy(&v, b, sizeof v);
          auto add = [&](auto nth) {
            constexpr int K = decltype(nth)::value;
            const Vec w4 = dequantize<K>(v, twice, offset);
            for (int r = 0; r < R; r++) c[r][j] += w4 * set(x[r * x_stride + 4 * s + K]);
          };
          add(std::integral_constant<int, 0>{});
          add(std::integral_constant<int, 1>{});
          add(std::integral_constant<int, 2>{});
          add(std::integral_constant<int, 3>{});
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
}

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

// acc [rows, 32] = rows [first, first + rows) of x times the unit.
void block_product(const LinearArgs& a, int64_t first, int rows, const Stream& w, bool prefetch, float* acc) {
#if defined(__AMX_TILE__)
  if (a.x_type == BF16) {
    const long bytes = a.x_stride * 2;
    const char* x = static_cast<const char*>(a.x) + first * bytes;
    const bool widen = a.linear->type == INT8;
    if (widen && rows > 16) tile_product<true, 2, false>(x, bytes, w, prefetch, false, acc);
    else if (widen) tile_product<true, 1, false>(x, bytes, w, prefetch, false, acc);
    else if (rows > 16) tile_product<false, 2, false>(x, bytes, w, prefetch, false, acc);
    else tile_product<false, 1, false>(x, bytes, w, prefetch, false, acc);
    return;
  }
#endif
  if (a.linear->type == F32) vector_block<F32>(a, first, rows, w, prefetch, acc);
  else if (a.linear->type == BF16) vector_block<BF16>(a, first, rows, w, prefetch, acc);
  else vector_block<INT8>(a, first, rows, w, prefetch, acc);
}

template <class Y>
INLINE void write_row(Epilogue epilogue, Y* y, int64_t column, const float* acc) {
  if (epilogue == SILU_AND_MUL) {
    for (int j = 0; j < 16; j += W) store(y + column / 2 + j, silu(load(acc + j)) * load(acc + 16 + j));
  } else {
    for (int j = 0; j < UNIT; j += 2 * W) store(y + column + j, load(acc + j), load(acc + j + W));
  }
}

// Bias, epilogue and store of rows [first, first + rows) of one unit: acc [rows, 32].
void finish_rows(const LinearArgs& a, int64_t column, int64_t first, int64_t rows, float* acc) {
  for (int64_t r = 0; r < rows; r++, acc += UNIT) {
    if (a.linear->bias)
      for (int j = 0; j < UNIT; j += W) store(acc + j, load(acc + j) + load(a.linear->bias + column + j));
    const int64_t at = (first + r) * a.y_stride;
    if (a.epilogue == ADD) {
      float* y = static_cast<float*>(a.y) + at + column;
      for (int j = 0; j < UNIT; j += W) store(y + j, load(y + j) + load(acc + j));
    } else if (a.y_type == BF16) {
      write_row(a.epilogue, static_cast<bf16*>(a.y) + at, column, acc);
    } else {
      write_row(a.epilogue, static_cast<float*>(a.y) + at, column, acc);
    }
  }
}

#if defined(__AMX_TILE__)
// Rows [begin, end) of x times one unit of bf16 tiles, as many k at a time as L1 holds of the unit: acc [end - begin, 32].
void panel_product(const LinearArgs& a, int64_t column, int64_t begin, int64_t end, const Stream& w, float* acc) {
  const long bytes = a.x_stride * 2;
  for (const char* at = w.at; at < w.end; at += DEEP * TILE_PAIR) {
    const char* behind = std::min(at + DEEP * TILE_PAIR, w.end);
    const Stream part{at, behind, behind < w.end ? behind : w.next};
    const char* x = static_cast<const char*>(a.x) + begin * bytes + (at - w.at) / TILE_PAIR * 64;
    float* to = acc;
    for (int64_t r = begin; r < end; r += MAX_ROWS, x += MAX_ROWS * bytes, to += MAX_ROWS * UNIT) {
      tile_product<false, 2, true>(x, bytes, part, r == begin, at != w.at, to);
      if (behind == w.end) finish_rows(a, column, r, std::min<int64_t>(MAX_ROWS, end - r), to);
    }
  }
}
#endif

// Rows [begin, end) times one unit.
void run_unit(const LinearArgs& a, int64_t unit, int64_t begin, int64_t end, Stream w) {
  const int64_t column = unit * UNIT;
#if defined(__AMX_TILE__)
  if (a.x_type == BF16 && end - begin > MAX_ROWS) {
    static thread_local Scratch<char> wide;
    static thread_local Scratch<float> panel;
    if (a.linear->type == INT8) {
      const int64_t bytes = a.linear->k / 32 * TILE_PAIR;
      char* tiles = wide.fit(bytes);
      widen_unit(w, tiles);
      w = {tiles, tiles + bytes, nullptr};
    }
    float* acc = panel.fit((PANEL + MAX_ROWS) * UNIT);
    panel_product(a, column, begin, end, w, acc);
    return;
  }
#endif
  alignas(64) float acc[MAX_ROWS * UNIT];
  for (int64_t first = begin; first < end; first += MAX_ROWS) {
    const int rows = int(std::min<int64_t>(MAX_ROWS, end - first));
    block_product(a, first, rows, w, first == begin, acc);
    finish_rows(a, column, first, rows, acc);
  }
}

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

// Packs one column, given as floats with zeros behind.
void pack_column(const Linear& l, int64_t column, const float* values) {
  char* to = static_cast<char*>(const_cast<void*>(l.weight)) + packed_offset(l, column, 0);
  if (l.type == F32) {
    for (int64_t i = 0; i < l.k; i++) memcpy(to + i * UNIT * 4, values + i, 4);
  } else if (l.type == BF16) {
    for (int64_t block = 0; block < l.k; block += 32, to += K_BYTES[BF16])
      for (int i = 0; i < 32; i += 2) {
        const uint32_t pair = to_bf16(values[block + i]) | uint32_t(to_bf16(values[block + i + 1])) << 16;
        memcpy(to + i * 32, &pair, 4);
      }
  } else {
    char* scales = static_cast<char*>(const_cast<void*>(l.weight)) + packed_offset(l, column / UNIT * UNIT, 0) - SCALES;
    for (int64_t block = 0; block < l.k; block += 32, to += K_BYTES[INT8], scales += K_BYTES[INT8]) {
      float top = 0;
      for (int i = 0; i < 32; i++)
        if (!(std::fabs(values[block + i]) <= top) && top == top) top = std::fabs(values[block + i]);  // NaN stays
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

void linear_units(const LinearArgs& given, Counter& next, int threads) {
  [[maybe_unused]] Tiles tiles;
  LinearArgs args = given;
  const Linear& l = *args.linear;
#if defined(__AMX_TILE__)
  static thread_local Scratch<float> floats;
  if (l.type == INT8 && args.x_type == BF16 && args.rows <= FEW_ROWS) {
    float* to = floats.fit(args.rows * l.k);
    for (int64_t r = 0; r < args.rows; r++)
      for (int64_t i = 0; i < l.k; i += W) store(to + r * l.k + i, load(static_cast<const bf16*>(given.x) + r * given.x_stride + i));
    args.x = to, args.x_stride = l.k, args.x_type = F32;
  }
#endif
  // Panel by panel of rows, unit by unit.
  const int64_t units = l.n / UNIT, bytes = l.k / K_BLOCK[l.type] * K_BYTES[l.type];
  const int64_t total = units * ((args.rows + PANEL - 1) / PANEL), grain = std::max<int64_t>(1, units / (16 * threads));
  const char* weight = static_cast<const char*>(l.weight);
  int64_t begin = next.take(grain);
  while (begin < total) {
    const int64_t following = next.take(grain), end = std::min(begin + grain, total);
    for (int64_t t = begin; t < end; t++) {
      const char* at = weight + t % units * bytes;
      const int64_t after = t + 1 < end ? t + 1 : following, first = t / units * PANEL;
      const char* then = after < total ? weight + after % units * bytes : nullptr;
      run_unit(args, t % units, first, std::min(first + PANEL, args.rows), {at, at + bytes, then});
    }
    begin = following;
  }
}

void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Linear& packed, int64_t begin, int64_t end) {
  static thread_local Scratch<float> column_values;
  float* values = column_values.fit(packed.k);
  std::fill(values, values + packed.k, 0.f);
  for (int64_t column = begin * UNIT; column < end * UNIT; column++) {
    for (int64_t i = 0; i < k; i++) values[i] = column < n ? element(w, w_type, column * k + i) : 0.f;
    pack_column(packed, column, values);
  }
}

void unpack_row(const Linear& packed, int64_t column, float* to, int64_t size) {
  const char* weight = static_cast<const char*>(packed.weight);
  for (int64_t i = 0; i < size; i++) to[i] = element(weight + packed_offset(packed, column, i), packed.type, 0);
}

}  // namespace chunkllama
