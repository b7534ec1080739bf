#include "adapter.h"

#include <algorithm>

#include "vec.h"

namespace chunkllama {
namespace {

constexpr int64_t ROWS = 32;      // of a unit
constexpr int64_t COLUMNS = 128;  // of a unit of the second product
constexpr int VECTORS = BLOCK / W;
constexpr int64_t AHEAD = 4096;   // bytes; matrices lie in the order of their use

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

// y [R, 16] = t [R, rank] * b [rank, 16].
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
    for (int j = 0; j < VECTORS; j++) store(y + r * y_stride + j * W, sums[r][j]);
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
void inner_unit(const AdapterArgs& a, const AdapterLinear& l, int64_t begin, int64_t end,
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

template <class B>
void outer_unit(const AdapterArgs& a, const AdapterLinear& l, int64_t begin, int64_t end,
                int64_t first, int64_t last) {
  for (int64_t row = begin; row < end; row++)
    std::fill(a.delta + row * a.delta_stride + first, a.delta + row * a.delta_stride + last, 0.f);
  for (int64_t p = 0; p < l.num_parts; p++) {
    const AdapterPart& part = l.parts[p];
    int64_t i = first > part.first ? (first - part.first + part.step - 1) / part.step : 0;
    for (; i < part.blocks && part.first + i * part.step < last; i++) {
      const B* weights = static_cast<const B*>(part.b) + i * part.rank * BLOCK;
      by_fours(a, begin, end, [&](int64_t row, auto n) {
        outer_rows<decltype(n)::value>(
            a.inner + row * a.inner_stride + part.offset, a.inner_stride, weights, part.rank,
            a.delta + row * a.delta_stride + part.first + i * part.step, a.delta_stride);
      });
    }
  }
}

// Units are the rows of each range, ROWS at a time, times `width`: runs f(adapter, first row, last
// row, index below width) for each.
template <class F>
void by_units(const AdapterArgs& a, Phase& phase, int threads, int64_t width, F&& f) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.num_ranges; i++)
    total += (a.ranges[i].end - a.ranges[i].begin + ROWS - 1) / ROWS * width;
  const int64_t grain = std::max<int64_t>(1, total / (8 * threads));
  phase.run(total, grain, [&](int64_t unit, int64_t last) {
    for (; unit < last; unit++) {
      int64_t piece = unit / width, pieces;
      const AdapterRange* range = a.ranges;
      for (; piece >= (pieces = (range->end - range->begin + ROWS - 1) / ROWS); range++)
        piece -= pieces;
      const int64_t begin = range->begin + piece * ROWS, end = std::min(begin + ROWS, range->end);
      f(range->linears[a.linear], begin, end, unit % width);
    }
  });
}

}  // namespace

bool is_adapted(const AdapterArgs& a) {
  return std::any_of(a.ranges, a.ranges + a.num_ranges, [&](const AdapterRange& range) {
    return range.linears[a.linear].num_parts > 0;
  });
}

void adapter_units(const AdapterArgs& a, Phase* phases, int threads) {
  by_units(a, phases[0], threads, (a.inner_stride + BLOCK - 1) / BLOCK,
           [&](const AdapterLinear& l, int64_t begin, int64_t end, int64_t block) {
             if (block * BLOCK >= l.ranks) return;
             const bool narrow = a.type == BF16;
             if (a.x_type == BF16) inner_unit<bf16, bf16>(a, l, begin, end, block);
             else if (narrow) inner_unit<float, bf16>(a, l, begin, end, block);
             else inner_unit<float, float>(a, l, begin, end, block);
           });
  by_units(a, phases[1], threads, (a.columns + COLUMNS - 1) / COLUMNS,
           [&](const AdapterLinear& l, int64_t begin, int64_t end, int64_t group) {
             const int64_t first = group * COLUMNS, last = std::min(first + COLUMNS, a.columns);
             if (a.type == BF16) outer_unit<bf16>(a, l, begin, end, first, last);
             else outer_unit<float>(a, l, begin, end, first, last);
           });
}

}  // namespace chunkllama
