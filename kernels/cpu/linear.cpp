#include "linear.h"

#include <algorithm>
#include <cmath>

#include "quads.h"
#include "quantized.h"
#include "scratch.h"
#include "tiles.h"
#include "vec.h"

namespace chunkllama {
namespace {

constexpr int MAX_ROWS = 32;     // rows of one block product
constexpr int TILE_PAIR = 2048;  // bytes of a k block of bf16: two tiles
// PANEL: most rows of x that are multiplied by a unit before the next. From LEAST_PANEL rows per
// thread on, each thread has rows of its own, which stay in its L2; with fewer, reading all of the
// weights for them costs more than the products.
#if defined(__AMX_TILE__)
constexpr int64_t PANEL = 256, LEAST_PANEL = 160;
constexpr int64_t DEEP = 18;       // k blocks of a unit that stay in L1 during a panel's rows
constexpr int64_t SLAB = 1 << 19;  // most bytes of x that are multiplied by units before the next
constexpr int64_t SLAB_UNITS = 8;  // fewest units of each slab: their sums of 256 rows are 256 KB
#else
constexpr int64_t PANEL = 512, LEAST_PANEL = 64;
#endif
// Vectors of columns and rows of one inner loop over floats: as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int WIDE_VECTORS = 2, WIDE_ROWS = 12;
#elif defined(__aarch64__)
constexpr int WIDE_VECTORS = 4, WIDE_ROWS = 6;
#elif defined(__AVX2__)
constexpr int WIDE_VECTORS = 2, WIDE_ROWS = 6;
#else
constexpr int WIDE_VECTORS = 2, WIDE_ROWS = 5;
#endif
constexpr int64_t LEAST_WIDE = 2 * WIDE_ROWS;  // rows that are worth widening a unit to floats
constexpr int64_t WIDE_PART = 1024;  // k (128 KB) that stay in L2 while all rows are multiplied
#if defined(BF16_PRODUCTS) && !defined(__AMX_TILE__)
#define PAIR_PRODUCTS 1  // bf16 products on the vector units
// Vectors of columns and rows of one inner loop: 24 sums in 32 registers.
#if defined(__AVX512F__)
constexpr int PAIR_VECTORS = 2, PAIR_ROWS = 12;
#else
constexpr int PAIR_VECTORS = 4, PAIR_ROWS = 6;
#endif
// k blocks (128 KB of weights) that stay in L2 while all rows are multiplied by them.
constexpr int64_t PAIR_PART = 64;
#endif

#if defined(__AMX_TILE__)

// Where tile loads find x: 16 rows `stride` bytes apart, the next 16 rows `lower` bytes on, the
// next k block `step` bytes on.
struct Rows {
  const char* at;
  long stride, lower, step;
};
INLINE Rows rows_of(const char* x, long stride) { return {x, stride, 16 * stride, 64}; }
INLINE Rows tiles_of(const char* x) { return {x, 64, TILE_PAIR / 2, TILE_PAIR}; }

// acc [16 * ROW_TILES, 32] (+)= x * unit. Quantized weights are widened one k block ahead of their
// use, through a buffer that stays in L1. With many rows (X is STREAM), x is loaded with the hint
// that keeps it out of L1, where the unit stays, and for each k block `pace` bytes at `later` are
// prefetched.
template <Type TYPE, int ROW_TILES, Hint X>
INLINE void tile_product(Rows x, const Stream& w, bool prefetch, bool accumulate, float* acc,
                         const char* later = nullptr, int pace = 0) {
  constexpr bool WIDEN = TYPE != BF16;
  const int bytes = WIDEN ? block_bytes(*w.format) : TILE_PAIR;
  alignas(64) char ahead[WIDEN ? 2 * TILE_PAIR : 64];
  auto widen_block = [&](const char* from, char* to) {
    if constexpr (WIDEN) widen<TYPE>(*w.format, from, to, w.ahead(from));
  };
  widen_block(w.at, ahead);
  int turn = 0;
  using Sum = TileSum<ROW_TILES, 2>;
  if (accumulate) Sum::load(acc, UNIT);
  else Sum::zero();
  for (const char* p = w.at; p < w.end; p += bytes, x.at += x.step, later += pace) {
    if (!WIDEN && prefetch) w.prefetch(p, bytes);
    for (int i = 0; X == STREAM && i < pace; i += 64) prefetch_l2(later + i);
    const char* tiles = p;
    if (WIDEN) {
      tiles = ahead + turn * TILE_PAIR;
      turn ^= 1;
      if (p + bytes < w.end) widen_block(p + bytes, ahead + turn * TILE_PAIR);
    }
    Sum::template add_product<X, KEEP>(x.at, x.stride, x.lower, tiles, 64, TILE_PAIR / 2);
  }
  Sum::store(acc, UNIT);
}
#endif

// The weights of a later product: `pace` bytes of them are prefetched for each k block of this one.
struct Later {
  const char* at;
  int pace;
  INLINE void prefetch() {
    for (int i = 0; i < pace; i += 64) prefetch_l2(at + i);
    at += pace;
  }
};

#if defined(PAIR_PRODUCTS)
// acc [R, 32] (+)= x [R] * the k blocks [at, end) of a unit of bf16 pairs. A row's sum is the same
// for every R.
template <int R>
INLINE void pair_product(const bf16* x, long x_stride, const char* at, const char* end,
                         Later& later, bool accumulate, float* acc) {
  constexpr int N = PAIR_VECTORS;
  for (int column = 0; column < UNIT; column += N * W) {
    Vec c[R][N] = {};
    if (accumulate)
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) c[r][j] = load(acc + r * UNIT + column + j * W);
    const bf16* from = x;
    for (const char* p = at; p < end; p += TILE_PAIR, from += 32) {
      if (column == 0) later.prefetch();
      const bf16* b = reinterpret_cast<const bf16*>(p);
      for (int s = 0; s < 16; s++, b += 2 * BLOCK) {
        IntVec columns[N];
        for (int j = 0; j < N; j++) {
          const int place = column + j * W;
          columns[j] = load_pairs(b + place / BLOCK * (TILE_PAIR / 4) + place % BLOCK * 2);
        }
        for (int r = 0; r < R; r++) {
          const IntVec pair = set_pair(from + r * x_stride + 2 * s);
          for (int j = 0; j < N; j++) c[r][j] = add_pairs(c[r][j], pair, columns[j]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
  }
}

INLINE void pair_rows(int rows, const bf16* x, long x_stride, const char* at, const char* end,
                      Later& later, bool accumulate, float* acc) {
  auto run = [&](auto count) {
    pair_product<decltype(count)::value>(x, x_stride, at, end, later, accumulate, acc);
  };
  switch (rows) {
    case 1: run(std::integral_constant<int, 1>{}); break;
    case 2: run(std::integral_constant<int, 2>{}); break;
    case 3: run(std::integral_constant<int, 3>{}); break;
    case 4: run(std::integral_constant<int, 4>{}); break;
    case 5: run(std::integral_constant<int, 5>{}); break;
#if defined(__AVX512F__)
    case 6: run(std::integral_constant<int, 6>{}); break;
    case 7: run(std::integral_constant<int, 7>{}); break;
    case 8: run(std::integral_constant<int, 8>{}); break;
    case 9: run(std::integral_constant<int, 9>{}); break;
    case 10: run(std::integral_constant<int, 10>{}); break;
    case 11: run(std::integral_constant<int, 11>{}); break;
#endif
    default: run(std::integral_constant<int, PAIR_ROWS>{});
  }
}
#endif

#if defined(__AVX512F__)
constexpr int BLOCKS = 2, VECTOR_ROWS = 8;  // column blocks and rows of one inner loop
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int BLOCKS = 1, VECTOR_ROWS = 5;
#else
constexpr int BLOCKS = 1, VECTOR_ROWS = 2;
#endif
constexpr int N = BLOCKS * 16 / W;

// acc [R, 32] = x [R] * columns [column, column + 16 * BLOCKS) of the unit, in float.
template <Type TYPE, int R>
INLINE void vector_product(const float* x, long x_stride, const Stream& w, bool prefetch,
                           int column, float* acc) {
  if constexpr (TYPE == INT8 || TYPE == INT4) {
    by_format(*w.format, [&](auto format) {
      if constexpr (TYPE == INT8)
        int8_product<R, N>(x, x_stride, w, format, prefetch, column, acc);
      else int4_product<R, N>(x, x_stride, w, format, prefetch, column, acc);
    });
    return;
  }
  Vec c[R][N] = {};
  for (const char* p = w.at; p < w.end; p += CODE_BYTES[TYPE], x += K_BLOCK[TYPE]) {
    if (prefetch) w.prefetch(p, CODE_BYTES[TYPE]);
    for (int j = 0; j < N; j++) {
      const int at = column + j * W;
      if constexpr (TYPE == F32) {
        const float* b = reinterpret_cast<const float*>(p) + at;
        for (int s = 0; s < 16; s++, b += UNIT)
          for (int r = 0; r < R; r++) c[r][j] += load(b) * set(x[r * x_stride + s]);
      } else {
        const bf16* b = reinterpret_cast<const bf16*>(p + at / 16 * 1024) + at % 16 * 2;
        for (int s = 0; s < 16; s++, b += 32) {
          const IntVec v = load_pairs(b);
          for (int r = 0; r < R; r++) c[r][j] += even(v) * set(x[r * x_stride + 2 * s]);
          for (int r = 0; r < R; r++) c[r][j] += odd(v) * set(x[r * x_stride + 2 * s + 1]);
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
#if defined(__AVX2__) || defined(__aarch64__)
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
void vector_block(const LinearArgs& a, int64_t first, int rows, const Stream& w, bool prefetch,
                  float* acc) {
  const float* x = static_cast<const float*>(a.x) + first * a.x_stride;
  for (int column = 0; column < UNIT; column += 16 * BLOCKS)
    by_rows(rows, [&](int r, auto n) {
      vector_product<TYPE, decltype(n)::value>(x + r * a.x_stride, a.x_stride, w,
                                               prefetch && r == 0, column, acc + r * UNIT);
    });
}

// acc [rows, 32] = rows [first, first + rows) of x times the unit.
void block_product(const LinearArgs& a, int64_t first, int rows, const Stream& w, bool prefetch,
                   float* acc) {
#if defined(__AMX_TILE__)
  if (a.x_type == BF16) {
    const Rows x = rows_of(static_cast<const char*>(a.x) + first * a.x_stride * 2, a.x_stride * 2);
    auto run = [&](auto type) {
      constexpr Type TYPE = Type(decltype(type)::value);
      if (rows > 16) tile_product<TYPE, 2, KEEP>(x, w, prefetch, false, acc);
      else tile_product<TYPE, 1, KEEP>(x, w, prefetch, false, acc);
    };
    switch (w.format->type) {
      case INT8: run(std::integral_constant<int, INT8>{}); break;
      case INT4: run(std::integral_constant<int, INT4>{}); break;
      default: run(std::integral_constant<int, BF16>{});
    }
    return;
  }
#endif
  switch (w.format->type) {
    case F32: vector_block<F32>(a, first, rows, w, prefetch, acc); break;
    case BF16: vector_block<BF16>(a, first, rows, w, prefetch, acc); break;
    case INT8: vector_block<INT8>(a, first, rows, w, prefetch, acc); break;
    default: vector_block<INT4>(a, first, rows, w, prefetch, acc);
  }
}

template <class Y>
INLINE void write_row(Epilogue epilogue, Y* y, int64_t column, const float* acc) {
  if (epilogue == SILU_AND_MUL) {
    constexpr Precision P = std::is_same_v<Y, bf16> ? COARSE : FINE;
    for (int j = 0; j < 16; j += W)
      store(y + column / 2 + j, silu<P>(load(acc + j)) * load(acc + 16 + j));
  } else {
    for (int j = 0; j < UNIT; j += 2 * W) store(y + column + j, load(acc + j), load(acc + j + W));
  }
}

// Columns [column, column + count) of a row are in acc. Few units hold a new best.
INLINE void keep_best(Best& best, int64_t column, int64_t count, const float* acc) {
  IntVec above{};
  for (int j = 0; j < UNIT; j += W) above |= ~(load(acc + j) < set(best.value));
  if (!any(above)) return;
  for (int64_t j = 0; j < count; j++) {
    const Best other{acc[j], int32_t(column + j)};
    if (beats(other, best)) best = other;
  }
}

// Bias, adapters, epilogue and store of rows [first, first + rows) of one unit: acc [rows, 32].
void finish_rows(const LinearArgs& a, int64_t column, int64_t first, int64_t rows, float* acc) {
  if (a.linear->bias)
    for (int64_t r = 0; r < rows; r++)
      for (int j = 0; j < UNIT; j += W)
        store(acc + r * UNIT + j, load(acc + r * UNIT + j) + load(a.linear->bias + column + j));
  if (a.adapters) add_outer(*a.adapters, first, first + rows, column, UNIT, acc, UNIT);
  for (int64_t r = 0; r < rows; r++, acc += UNIT) {
    const int64_t at = (first + r) * a.y_stride;
    if (a.epilogue == BEST) {
      keep_best(a.best[first + r], column, std::min<int64_t>(UNIT, a.columns - column), acc);
    } else if (a.epilogue == ADD) {
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
// Rows [begin, end) of x as the sequence of tiles that panel_product reads:
// [rows / 32][k / 32][2][16][32].
const char* pack_panel(const LinearArgs& a, int64_t begin, int64_t end) {
  static thread_local Scratch<char> tiles;
  const int64_t blocks = a.linear->k / 32;
  char *const packed = tiles.fit((end - begin + MAX_ROWS) * a.linear->k * 2), *to = packed;
  for (int64_t r = begin; r < end; r += MAX_ROWS, to += blocks * TILE_PAIR)
    for (int i = 0; i < MAX_ROWS; i++) {
      const char* from = static_cast<const char*>(a.x) + (r + i) * a.x_stride * 2;
      for (int64_t k = 0; k < blocks; k++) memcpy(to + k * TILE_PAIR + i * 64, from + k * 64, 64);
    }
  return packed;
}

// Rows [begin, end) of x (`tiles`, as packed above, from the k on where `w` begins) times one unit
// of bf16 tiles, as many k at a time as L1 holds of the unit. What is at w.next is prefetched
// meanwhile, spread over all rows: a burst would stall the first of them. acc [rows, 32] has the
// sums of the k before (`accumulate`); they are complete with the `last` k.
void panel_product(const LinearArgs& a, int64_t column, int64_t begin, int64_t end,
                   const char* tiles, const Stream& w, bool accumulate, bool last, float* acc) {
  const long block = a.linear->k * 2 * MAX_ROWS, part = DEEP * TILE_PAIR;
  const int64_t blocks = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
  const int64_t pace = w.next ? (TILE_PAIR / blocks + 63) / 64 * 64 : 0;
  // With a single part every block of rows uses the same sums, which stay in L1.
  const int64_t advance = w.end - w.at > part || accumulate || !last ? MAX_ROWS * UNIT : 0;
  const char* later = w.next;
  for (const char* at = w.at; at < w.end; at += part) {
    const Stream stream{at, std::min(at + part, w.end), nullptr, w.format};
    const char* x = tiles + (at - w.at);
    float* to = acc;
    for (int64_t r = begin; r < end; r += MAX_ROWS, x += block, to += advance) {
      tile_product<BF16, 2, STREAM>(tiles_of(x), stream, false, accumulate || at != w.at, to, later,
                                    int(pace));
      if (pace) later += (stream.end - at) / TILE_PAIR * pace;
      if (last && stream.end == w.end)
        finish_rows(a, column, r, std::min<int64_t>(MAX_ROWS, end - r), to);
    }
  }
}
#endif

// acc [R, 32] (+)= x [R] * columns [depth, 32] of floats. A row's sum is that of `vector_product`
// with bf16 and float weights, for every R.
template <int R>
INLINE void wide_product(const float* x, long x_stride, const float* columns, int64_t depth,
                         Later& later, bool accumulate, float* acc) {
  constexpr int N = WIDE_VECTORS;
  for (int column = 0; column < UNIT; column += N * W) {
    Vec c[R][N] = {};
    if (accumulate)
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) c[r][j] = load(acc + r * UNIT + column + j * W);
    const float* b = columns + column;
    for (int64_t k = 0; k < depth; k += 16) {
      if (column == 0) later.prefetch();
      for (int s = 0; s < 16; s++, b += UNIT) {
        Vec v[N];
        for (int j = 0; j < N; j++) v[j] = load(b + j * W);
        for (int r = 0; r < R; r++) {
          const Vec each = set(x[r * x_stride + k + s]);
          for (int j = 0; j < N; j++) c[r][j] += v[j] * each;
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < N; j++) store(acc + r * UNIT + column + j * W, c[r][j]);
  }
}

template <int R = WIDE_ROWS>
INLINE void wide_rows(int rows, const float* x, long x_stride, const float* columns, int64_t depth,
                      Later& later, bool accumulate, float* acc) {
  if constexpr (R > 1) {
    if (rows < R) {
      wide_rows<R - 1>(rows, x, x_stride, columns, depth, later, accumulate, acc);
      return;
    }
  }
  wide_product<R>(x, x_stride, columns, depth, later, accumulate, acc);
}

// Rows [begin, end) of x, in float, times one unit, as many k at a time as L2 holds as floats. The
// weights of the next part are prefetched meanwhile, spread over all rows: a burst would stall the
// first of them.
void wide_unit(const LinearArgs& a, int64_t column, int64_t begin, int64_t end, const Stream& w) {
  static thread_local Scratch<float> panel, floats;
  const int64_t rows = end - begin, blocks = (rows + WIDE_ROWS - 1) / WIDE_ROWS;
  const int64_t unit = K_BLOCK[w.format->type], bytes = block_bytes(*w.format);
  const int64_t count = (w.end - w.at) / bytes, parts = (count * unit + WIDE_PART - 1) / WIDE_PART;
  const int64_t part = (count + parts - 1) / parts;  // blocks of k
  float* const acc = panel.fit(PANEL * UNIT);
  float* const wide = floats.fit(part * unit * UNIT);
  // With a single part every block of rows uses the same sums, which stay in L1.
  const int64_t advance = parts > 1 ? UNIT : 0;
  const float* x = static_cast<const float*>(a.x) + begin * a.x_stride;
  for (int64_t first = 0; first < count; first += part, x += part * unit) {
    const int64_t here = std::min(part, count - first), depth = here * unit;
    const char *at = w.at + first * bytes, *stop = at + here * bytes;
    const float* columns = wide;
    if (w.format->type == F32) columns = reinterpret_cast<const float*>(at);
    else widen_to_floats(*w.format, at, stop, wide);
    const char* next = stop < w.end ? stop : w.next;
    const int64_t places = blocks * depth / 16;
    Later later{next, next ? int((here * bytes / places + 63) / 64 * 64) : 0};
    for (int64_t i = 0; i < blocks; i++) {
      const Range block = share(rows, int(i), int(blocks));
      const int64_t r = block.begin;
      const int own = int(block.end - r);
      float* to = acc + r * advance;
      wide_rows(own, x + r * a.x_stride, a.x_stride, columns, depth, later, first > 0, to);
      if (stop == w.end) finish_rows(a, column, begin + r, own, to);
    }
  }
}

#if defined(PAIR_PRODUCTS)
// Rows [begin, end) of x times one unit of bf16 pairs, as many k at a time as L2 holds beside the
// next part of the weights. That part is prefetched meanwhile, spread over all rows: a burst would
// stall the first of them.
void pair_unit(const LinearArgs& a, int64_t column, int64_t begin, int64_t end, const Stream& w) {
  static thread_local Scratch<float> panel;
  float* const acc = panel.fit(PANEL * UNIT);
  const int64_t rows = end - begin, blocks = (rows + PAIR_ROWS - 1) / PAIR_ROWS;
  const int64_t depth = (w.end - w.at) / TILE_PAIR, parts = (depth + PAIR_PART - 1) / PAIR_PART;
  const int64_t part = (depth + parts - 1) / parts * TILE_PAIR;
  // With a single part every block of rows uses the same sums, which stay in L1.
  const int64_t advance = parts > 1 ? UNIT : 0;
  const bf16* x = static_cast<const bf16*>(a.x) + begin * a.x_stride;
  for (const char* at = w.at; at < w.end; at += part, x += part / TILE_PAIR * 32) {
    const char* stop = std::min(at + part, w.end);
    const char* next = stop < w.end ? stop : w.next;
    Later later{next, next ? int((TILE_PAIR / blocks + 63) / 64 * 64) : 0};
    for (int64_t i = 0; i < blocks; i++) {
      const Range block = share(rows, int(i), int(blocks));  // even: few rows wait for weights
      const int64_t r = block.begin, count = block.end - r;
      float* to = acc + r * advance;
      pair_rows(int(count), x + r * a.x_stride, a.x_stride, at, stop, later, at != w.at, to);
      if (stop == w.end) finish_rows(a, column, begin + r, count, to);
    }
  }
}
#endif

#if defined(QUAD_PRODUCTS)
// Whether a matrix is multiplied by activations of 8 bits.
bool takes_quads(const Weights& w, int64_t rows) {
  return w.type == INT4 && w.bytes && rows <= std::min<int64_t>(w.few_rows, MAX_ROWS);
}

// Rounds x [a.rows, k] to 8 bits, [a.rows][k / 32]; null if no matrix takes that.
const QuadBlock* round_rows(const LinearArgs& a) {
  bool any = false;
  for (const Weights& w : a.linear->parts) any |= w.n && takes_quads(w, a.rows);
  if (!any) return nullptr;
  static thread_local Scratch<QuadBlock> blocks;
  const int64_t depth = a.linear->k / 32;
  QuadBlock* to = blocks.fit(a.rows * depth);
  alignas(64) float values[32];
  for (int64_t r = 0; r < a.rows; r++)
    for (int64_t i = 0; i < depth; i++) {
      const int64_t at = r * a.x_stride + i * 32;
      const float* x = static_cast<const float*>(a.x) + at;
      if (a.x_type == BF16) {
        const bf16* half = static_cast<const bf16*>(a.x) + at;
        for (int j = 0; j < 32; j += W) store(values + j, load(half + j));
        x = values;
      }
      to[r * depth + i] = quantize_block(x);
    }
  return to;
}

// All rows, in 8 bits, times one unit of int4.
void quad_unit(const LinearArgs& a, int64_t column, const QuadBlock* x, const Stream& w) {
  alignas(64) float acc[MAX_ROWS * UNIT];
  const int64_t depth = a.linear->k / 32;
  by_format(*w.format, [&](auto format) {
    for (int first = 0; first < UNIT; first += 16 * BLOCKS)
      by_rows(int(a.rows), [&](int r, auto n) {
        quad_product<decltype(n)::value, N>(x + r * depth, depth, w, format, r == 0, first,
                                            acc + r * UNIT);
      });
  });
  finish_rows(a, column, 0, a.rows, acc);
}
#else
struct QuadBlock;
const QuadBlock* round_rows(const LinearArgs&) { return nullptr; }
#endif

// Rows [begin, end) times one unit.
void run_unit(const LinearArgs& a, int64_t unit, int64_t begin, int64_t end,
              [[maybe_unused]] const QuadBlock* quads, Stream w) {
  const int64_t column = unit * UNIT;
#if defined(QUAD_PRODUCTS)
  if (quads && takes_quads(*w.format, a.rows)) {
    quad_unit(a, column, quads, w);
    return;
  }
#endif
#if defined(PAIR_PRODUCTS)
  if (a.x_type == BF16) {
    static thread_local Scratch<char> wide;
    if (is_quantized(*w.format)) w = widen_unit(w, wide.fit(a.linear->k / 32 * TILE_PAIR));
    pair_unit(a, column, begin, end, w);
    return;
  }
#endif
  const bool widens = is_quantized(*w.format) && w.format->few_rows < 0;
  // By the rows of all panels: which of them have few depends on the number of threads.
  if (a.x_type != BF16 && (widens || a.rows >= LEAST_WIDE)) {
    wide_unit(a, column, begin, end, w);
    return;
  }
  alignas(64) float acc[MAX_ROWS * UNIT];
  for (int64_t first = begin; first < end; first += MAX_ROWS) {
    const int rows = int(std::min<int64_t>(MAX_ROWS, end - first));
    block_product(a, first, rows, w, first == begin, acc);
    finish_rows(a, column, first, rows, acc);
  }
}

Stream unit_of(const Linear& l, int64_t unit) {
  const Weights* w = l.parts;
  for (; unit >= w->n / UNIT; w++) unit -= w->n / UNIT;
  const int64_t bytes = l.k / K_BLOCK[w->type] * block_bytes(*w);
  const char* at = static_cast<const char*>(w->data) + unit * bytes;
  return {at, at + bytes, nullptr, w};
}

#if defined(__AMX_TILE__)
// Blocks of k (of `depth`) of a panel's x that some units are multiplied by before the next ones.
int64_t slab_blocks(int64_t rows, int64_t depth) {
  const int64_t most = std::max(DEEP, SLAB / (rows * 64)), slabs = (depth + most - 1) / most;
  return (depth + slabs - 1) / slabs;
}

// Rows [first, last) of x (`tiles`, as packed above) times units [begin, end); `following` is taken
// after them, if there is such a unit. Sums of all of them stay in L2 from slab to slab.
void panel_units(const LinearArgs& a, int64_t begin, int64_t end, int64_t following, int64_t first,
                 int64_t last, const char* tiles) {
  static thread_local Scratch<char> wide;
  static thread_local Scratch<float> sums;
  const Linear& l = *a.linear;
  const int64_t depth = l.k / 32, slab = slab_blocks(last - first, depth);
  const int64_t rows = (last - first + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS;
  const int64_t own = slab < depth ? rows * UNIT : 0;  // else all units use the same ones
  float* const acc = sums.fit(rows * UNIT + (end - begin - 1) * own);
  auto slab_of = [&](int64_t unit, int64_t k) {
    const Stream w = unit_of(l, unit);
    const int64_t bytes = block_bytes(*w.format);
    return Stream{w.at + k * bytes, std::min(w.at + (k + slab) * bytes, w.end), nullptr, w.format};
  };
  for (int64_t k = 0; k < depth; k += slab) {
    const bool is_last = k + slab >= depth;
    for (int64_t u = begin; u < end; u++) {
      Stream w = slab_of(u, k);
      if (u + 1 < end) w.next = slab_of(u + 1, k).at;
      else if (!is_last) w.next = slab_of(begin, k + slab).at;
      else if (following < l.n / UNIT) w.next = slab_of(following, 0).at;
      if (is_quantized(*w.format)) w = widen_unit(w, wide.fit(slab * TILE_PAIR));
      panel_product(a, u * UNIT, first, last, tiles + k * TILE_PAIR, w, k > 0, is_last,
                    acc + (u - begin) * own);
    }
  }
}
#endif

#if defined(BF16_PRODUCTS)
// Whether units are multiplied by floats: all parts are quantized and the rows are few, and not all
// of them take 8 bits.
bool takes_floats(const LinearArgs& a) {
  bool any = false;
  for (const Weights& w : a.linear->parts) {
    if (!w.n) continue;
    if (!is_quantized(w) || a.rows > w.few_rows) return false;
    any |= !takes_quads(w, a.rows);
  }
  return any;
}

// With x as floats, for the vector units.
LinearArgs with_floats(LinearArgs a) {
  static thread_local Scratch<float> floats;
  const int64_t k = a.linear->k;
  float* to = floats.fit(a.rows * k);
  for (int64_t r = 0; r < a.rows; r++)
    for (int64_t i = 0; i < k; i += W)
      store(to + r * k + i, load(static_cast<const bf16*>(a.x) + r * a.x_stride + i));
  a.x = to, a.x_stride = k, a.x_type = F32;
  return a;
}
#endif

// Takes units of one panel of rows until none is left. Helping with another thread's panel (`late`)
// pays only while many units of it are left.
void run_panel(LinearArgs a, int64_t first, int64_t last, Phase& phase, int threads, bool late) {
  const Linear& l = *a.linear;
  const int64_t units = l.n / UNIT;
  if (late && phase.taken() > units * 3 / 4) return;
  // Two units of SILU_AND_MUL share the cache lines of y.
  const int64_t even = a.epilogue == SILU_AND_MUL ? 2 : 1;
  int64_t grain = std::max<int64_t>(1, units / (16 * threads * even)) * even;
  const QuadBlock* quads = nullptr;
#if defined(__AMX_TILE__)
  const bool is_panel = a.x_type == BF16 && last - first > MAX_ROWS;
  const char* packed = nullptr;
  // Each slab of x is read once for all units that are taken together.
  const int64_t blocks = l.k / 32;
  if (is_panel && slab_blocks(last - first, blocks) < blocks) 
    grain = std::max(grain, std::min<int64_t>(SLAB_UNITS, units / (2 * threads * even) * even));
#endif
  int64_t begin = phase.take(grain);
  while (begin < units) {
    const int64_t following = phase.take(grain), end = std::min(begin + grain, units);
#if defined(__AMX_TILE__)
    if (is_panel) {
      if (!packed) packed = pack_panel(a, first, last);
      panel_units(a, begin, end, following, first, last, packed);
      phase.finish(end - begin);
      begin = following;
      continue;
    }
#endif
    if (!quads) quads = round_rows(a);
#if defined(BF16_PRODUCTS)
    if (a.x_type == BF16 && takes_floats(a)) a = with_floats(a);
#endif
    for (int64_t u = begin; u < end; u++) {
      const int64_t after = u + 1 < end ? u + 1 : following;
      Stream w = unit_of(l, u);
      if (after < units) w.next = unit_of(l, after).at;
      run_unit(a, u, first, last, quads, w);
    }
    phase.finish(end - begin);
    begin = following;
  }
}

}  // namespace

int64_t panel_rows(int64_t rows, int threads) {
  const int64_t each = (rows + threads - 1) / threads;
  return each < LEAST_PANEL ? PANEL : std::min(PANEL, (each + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS);
}

void linear_units(const LinearArgs& args, Phase* panels, int thread, int threads) {
  const int64_t size = panel_rows(args.rows, threads), count = (args.rows + size - 1) / size;
  {
    [[maybe_unused]] Tiles tiles;
    for (int64_t i = 0; i < count; i++) {
      const int64_t panel = (thread + i) % count, begin = panel * size;
      run_panel(args, begin, std::min(begin + size, args.rows), panels[panel], threads,
                count > 1 && i > 0);
    }
  }
  for (int64_t i = 0; i < count; i++) panels[i].wait(args.linear->n / UNIT);
}

}  // namespace chunkllama
