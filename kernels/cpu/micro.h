// C[R][NB * 16] (+)= A[R][k] * B[k][NB * 16] on the vector units: the one inner loop behind q.k,
// p.v and the linears.
//
// B is stored in blocks of 16 columns, `block_stride` elements apart. A step is one k for float and
// int8, a pair of k for bf16 (columns [16][2], as the tile instructions read them), `step_stride`
// elements apart. A is float, or with BF16_PRODUCTS bf16 where B is; its rows then are `lda`
// elements apart, an even number.
#pragma once
#include <algorithm>

#include "prefetch.h"
#include "vec.h"

namespace chunkllama {

#if defined(__AVX512F__)
constexpr int MAX_BLOCKS = 4;
constexpr int MAX_ROWS = 6;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int MAX_BLOCKS = 1;
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_BLOCKS = 1;
constexpr int MAX_ROWS = 3;
#endif

template <class T>
constexpr int STEP = std::is_same<T, bf16>::value ? 2 : 1;  // k per step

template <class T, int R, int NB, bool ACCUMULATE, class A>
static INLINE void product(const A* a, long lda, const T* b, long step_stride, long block_stride,
                           float* c, long ldc, int steps, Prefetcher& ahead) {
  constexpr int VB = BLOCK / W, N = NB * VB;
  Vec acc[R][N];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) acc[r][j] = ACCUMULATE ? load(c + r * ldc + j * W) : Vec{};
  for (int s = 0; s < steps; s++, b += step_stride) {
    ahead.step(NB);
#if defined(BF16_PRODUCTS)
    if constexpr (std::is_same_v<A, bf16>) {
      static_assert(STEP<T> == 2, "bf16 rows need columns of bf16 pairs");
      IntVec pairs[N];
      for (int j = 0; j < N; j++) pairs[j] = load_pairs(b + j / VB * block_stride + j % VB * W * 2);
      for (int r = 0; r < R; r++) {
        const IntVec x = set_pair(a + r * lda + 2 * s);
        for (int j = 0; j < N; j++) acc[r][j] = add_pairs(acc[r][j], x, pairs[j]);
      }
      continue;
    } else
#endif
        if constexpr (STEP<T> == 2) {
      IntVec pairs[N];
      for (int j = 0; j < N; j++) pairs[j] = load_pairs(b + j / VB * block_stride + j % VB * W * 2);
      for (int r = 0; r < R; r++) {
        const Vec x = set(a[r * lda + 2 * s]);
        for (int j = 0; j < N; j++) acc[r][j] += x * even(pairs[j]);
      }
      for (int r = 0; r < R; r++) {
        const Vec x = set(a[r * lda + 2 * s + 1]);
        for (int j = 0; j < N; j++) acc[r][j] += x * odd(pairs[j]);
      }
    } else {
      Vec v[N];
      for (int j = 0; j < N; j++) v[j] = load(b + j / VB * block_stride + j % VB * W);
      for (int r = 0; r < R; r++) {
        const Vec x = set(a[r * lda + s]);
        for (int j = 0; j < N; j++) acc[r][j] += x * v[j];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(c + r * ldc + j * W, acc[r][j]);
}

// Any number of rows, `blocks` <= MAX_BLOCKS column blocks.
template <class T, bool ACCUMULATE, int NB, class A>
static INLINE void product_rows(int rows, const A* a, long lda, const T* b, long step_stride,
                                long block_stride, float* c, long ldc, int steps,
                                Prefetcher& ahead) {
  for (int r = 0; r < rows;) {
    const int n = std::min(MAX_ROWS, rows - r);
    auto run = [&](auto count) {
      product<T, decltype(count)::value, NB, ACCUMULATE>(
          a + r * lda, lda, b, step_stride, block_stride, c + r * ldc, ldc, steps, ahead);
    };
    switch (n) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
#if defined(__AVX2__) || defined(__aarch64__)
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
#endif
      default: run(std::integral_constant<int, MAX_ROWS>{});
    }
    r += n;
  }
}

// Any number of column blocks: full groups of MAX_BLOCKS, then one by one.
template <class T, bool ACCUMULATE, class A>
static INLINE void product_blocks(int rows, int blocks, const A* a, long lda, const T* b,
                                  long step_stride, long block_stride, float* c, long ldc,
                                  int steps, Prefetcher& ahead) {
  int j = 0;
  for (; j + MAX_BLOCKS <= blocks; j += MAX_BLOCKS)
    product_rows<T, ACCUMULATE, MAX_BLOCKS>(rows, a, lda, b + j * block_stride, step_stride,
                                            block_stride, c + j * BLOCK, ldc, steps, ahead);
  for (; MAX_BLOCKS > 1 && j < blocks; j++)
    product_rows<T, ACCUMULATE, 1>(rows, a, lda, b + j * block_stride, step_stride, block_stride,
                                   c + j * BLOCK, ldc, steps, ahead);
}

}  // namespace chunkllama
