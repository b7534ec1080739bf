#include "adapter.h"

#include <algorithm>

#include "vec.h"

namespace chunkllama {
namespace {

constexpr int64_t ROWS = 32;  // of a unit
constexpr int VECTORS = BLOCK / W;
constexpr int64_t AHEAD = 4096;  // bytes; matrices lie in the order of their use

// Products of few rows wait for the adapter's matrices, of which every step reads all.
template <class T>
INLINE void prefetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
}

// t [R, 16] = x [R, k] * a [k, 16].
template <int R, class X, class A>
void inner_rows(const X* x, int64_t x_stride, const A* a, int64_t k, float* t, int64_t t_stride) {
  constexpr int TURNS = R > 2 || VECTORS > 2 ? 1 : 4;  // sums that do not wait for one another
  Vec sums[TURNS][R][VECTORS] = {};
  auto add = [&](int64_t i, int turn) {
    prefetch_ahead(a + i * BLOCK);
    for (int j = 0; j < VECTORS; j++) {
      const Vec weights = load(a + i * BLOCK + j * W);
      for (int r = 0; r < R; r++) sums[turn][r][j] += weights * set(to_float(x[r * x_stride + i]));
    }
  };
  int64_t i = 0;
  for (; i + TURNS <= k; i += TURNS)
    for (int turn = 0; turn < TURNS; turn++) add(i + turn, turn);
  for (; i < k; i++) add(i, 0);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < VECTORS; j++) {
      for (int turn = 1; turn < TURNS; turn++) sums[0][r][j] += sums[turn][r][j];
      store(t + r * t_stride + j * W, sums[0][r][j]);
    }
}

// t [R, 8] = x [R, k] * a [k, 8]: a block of 16 holds two k.
template <int R, class X, class A>
void inner_half_rows(const X* x, int64_t x_stride, const A* a, int64_t k, float* t,
                     int64_t t_stride) {
  constexpr int TURNS = R > 2 || VECTORS > 2 ? 1 : 4;
  Vec sums[TURNS][R][VECTORS] = {};
  auto add = [&](int64_t i, int turn) {
    prefetch_ahead(a + i * BLOCK);
    for (int j = 0; j < VECTORS; j++) {
      const Vec weights = load(a + i * BLOCK + j * W);
      for (int r = 0; r < R; r++) {
        const X* pair = x + r * x_stride + 2 * i;
        Vec values;
        if constexpr (W == BLOCK)
          values = first_lanes(BLOCK / 2, set(to_float(pair[0])), set(to_float(pair[1])));
        else values = set(to_float(pair[j * W >= BLOCK / 2]));
        sums[turn][r][j] += weights * values;
      }
    }
  };
  int64_t i = 0;
  for (; i + TURNS <= k / 2; i += TURNS)
    for (int turn = 0; turn < TURNS; turn++) add(i + turn, turn);
  for (; i < k / 2; i++) add(i, 0);
  for (int r = 0; r < R; r++) {
    alignas(64) float both[BLOCK];
    for (int j = 0; j < VECTORS; j++) {
      for (int turn = 1; turn < TURNS; turn++) sums[0][r][j] += sums[turn][r][j];
      store(both + j * W, sums[0][r][j]);
    }
    for (int j = 0; j < BLOCK / 2; j++) t[r * t_stride + j] = both[j] + both[BLOCK / 2 + j];
  }
}

// y [R, 16] += t [R, rank] * b [rank, 16].
template <int R, class B>
void outer_rows(const float* t, int64_t t_stride, const B* b, int64_t rank, float* y,
                int64_t y_stride) {
  Vec sums[R][VECTORS] = {};
  for (int64_t k = 0; k < rank; k++) {
    prefetch_ahead(b + k * BLOCK);
    for (int j = 0; j < VECTORS; j++) {
      const Vec weights = load(b + k * BLOCK + j * W);
      for (int r = 0; r < R; r++) sums[r][j] += weights * set(t[r * t_stride + k]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < VECTORS; j++) {
      float* at = y + r * y_stride + j * W;
      store(at, load(at) + sums[r][j]);
    }
}

// Calls f(first row, number of rows as a constant) for rows [begin, end), four at a time, or one at
// a time: the order of summation depends on their number.
template <class F>
void by_fours(const AdapterArgs& a, int64_t begin, int64_t end, F&& f) {
  if (a.independent_rows) {
    for (; begin < end; begin++) f(begin, std::integral_constant<int, 1>{});
    return;
  }
  for (; begin + 4 <= end; begin += 4) f(begin, std::integral_constant<int, 4>{});
  switch (end - begin) {
    case 1: f(begin, std::integral_constant<int, 1>{}); break;
    case 2: f(begin, std::integral_constant<int, 2>{}); break;
    case 3: f(begin, std::integral_constant<int, 3>{}); break;
  }
}

template <class X, class A>
void inner_block(const AdapterArgs& a, const AdapterLinear& l, int64_t begin, int64_t end,
                 int64_t block) {
  const A* weights = static_cast<const A*>(l.a) + block * l.k * BLOCK;
  const bool is_half = l.ranks - block * BLOCK < BLOCK;
  by_fours(a, begin, end, [&](int64_t row, auto n) {
    constexpr int R = decltype(n)::value;
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    float* t = a.inner + row * a.inner_stride + block * BLOCK;
    if (is_half) inner_half_rows<R>(x, a.x_stride, weights, l.k, t, a.inner_stride);
    else inner_rows<R>(x, a.x_stride, weights, l.k, t, a.inner_stride);
  });
}

void inner_unit(const AdapterArgs& a, const AdapterLinear& l, int64_t begin, int64_t end,
                int64_t block) {
  if (a.x_type == BF16) inner_block<bf16, bf16>(a, l, begin, end, block);
  else if (a.type == BF16) inner_block<float, bf16>(a, l, begin, end, block);
  else inner_block<float, float>(a, l, begin, end, block);
}

template <class B>
void outer_unit(const AdapterArgs& a, const AdapterLinear& l, int64_t begin, int64_t end,
                int64_t first, int64_t last, float* y, int64_t y_stride) {
  for (int64_t p = 0; p < l.num_parts; p++) {
    const AdapterPart& part = l.parts[p];
    int64_t i = first > part.first ? (first - part.first + part.step - 1) / part.step : 0;
    for (; i < part.blocks && part.first + i * part.step < last; i++) {
      const B* weights = static_cast<const B*>(part.b) + i * part.rank * BLOCK;
      by_fours(a, begin, end, [&](int64_t row, auto n) {
        outer_rows<decltype(n)::value>(a.inner + row * a.inner_stride + part.offset,
                                       a.inner_stride, weights, part.rank,
                                       y + (row - begin) * y_stride + part.first +
                                           i * part.step - first,
                                       y_stride);
      });
    }
  }
}

// Runs f(adapter, first row, last row) for the parts of the ranges in [begin, end).
template <class F>
void by_ranges(const AdapterArgs& a, int64_t begin, int64_t end, F&& f) {
  for (const AdapterRange* range = a.ranges; range < a.ranges + a.num_ranges; range++) {
    const int64_t first = std::max(begin, range->begin), last = std::min(end, range->end);
    const AdapterLinear& l = range->linears[a.linear];
    if (first < last && l.num_parts) f(l, first, last);
  }
}

}  // namespace

bool is_adapted(const AdapterArgs& a) {
  return std::any_of(a.ranges, a.ranges + a.num_ranges, [&](const AdapterRange& range) {
    return range.linears[a.linear].num_parts > 0;
  });
}

void fill_inner(const AdapterArgs& a, int64_t begin, int64_t end) {
  by_ranges(a, begin, end, [&](const AdapterLinear& l, int64_t first, int64_t last) {
    for (int64_t block = 0; block * BLOCK < l.ranks; block++)
      inner_unit(a, l, first, last, block);
  });
}

int64_t take_inner(const AdapterArgs& a, Phase& phase, int threads) {
  const int64_t width = (a.inner_stride + BLOCK - 1) / BLOCK;
  auto pieces_of = [](const AdapterRange& range) {
    return (range.end - range.begin + ROWS - 1) / ROWS;
  };
  int64_t total = 0;
  for (int64_t i = 0; i < a.num_ranges; i++) total += pieces_of(a.ranges[i]) * width;
  const int64_t grain = std::max<int64_t>(1, total / (8 * threads));
  for (int64_t unit; (unit = phase.take(grain)) < total;) {
    const int64_t last = std::min(unit + grain, total);
    for (int64_t at = unit; at < last; at++) {
      int64_t piece = at / width, pieces;
      const AdapterRange* range = a.ranges;
      for (; piece >= (pieces = pieces_of(*range)); range++) piece -= pieces;
      const AdapterLinear& l = range->linears[a.linear];
      const int64_t begin = range->begin + piece * ROWS, block = at % width;
      if (block * BLOCK < l.ranks)
        inner_unit(a, l, begin, std::min(begin + ROWS, range->end), block);
    }
    phase.finish(last - unit);
  }
  return total;
}

void add_outer(const AdapterArgs& a, int64_t begin, int64_t end, int64_t column, int64_t columns,
               float* y, int64_t y_stride) {
  by_ranges(a, begin, end, [&](const AdapterLinear& l, int64_t first, int64_t last) {
    float* to = y + (first - begin) * y_stride;
    if (a.type == BF16)
      outer_unit<bf16>(a, l, first, last, column, column + columns, to, y_stride);
    else outer_unit<float>(a, l, first, last, column, column + columns, to, y_stride);
  });
}

}  // namespace chunkllama
