// AMX tiles: accumulators, and the configuration of a thread.
#pragma once
#if defined(__AMX_TILE__)
#include <cstdint>
#include <utility>

#include "tile_instructions.h"
#include "vec.h"

namespace chunkllama {

template <class F, int... I>
static INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
static INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// Accumulators [16 * ROWS, 16 * COLUMNS] in tiles 0 to 3: tile r * COLUMNS + c.
template <int ROWS, int COLUMNS>
struct TileSum {
  static_assert(ROWS <= 2 && ROWS * COLUMNS <= 4, "four accumulators, two tiles of a and two of b");
  static INLINE void zero() {
    unroll<ROWS * COLUMNS>([](auto t) { tile_zero<t()>(); });
  }
  static INLINE void load(const float* from, long stride) {
    unroll<ROWS * COLUMNS>([&](auto t) {
      tile_load<t()>(from + t() / COLUMNS * 16 * stride + t() % COLUMNS * 16, stride * 4);
    });
  }
  static INLINE void store(float* to, long stride) {
    unroll<ROWS * COLUMNS>([&](auto t) {
      tile_store<t()>(to + t() / COLUMNS * 16 * stride + t() % COLUMNS * 16, stride * 4);
    });
  }
  // += a * b: ROWS tiles of a, `a_next` bytes apart, by COLUMNS tiles of b.
  template <Hint A, Hint B>
  static INLINE void add_product(const void* a, long a_stride, long a_next, const void* b,
                                 long b_stride, long b_next) {
    unroll<COLUMNS>([&](auto c) {
      unroll<ROWS>([&](auto r) {
        if constexpr (c() == 0)
          tile_load<4 + r(), A>(static_cast<const char*>(a) + r() * a_next, a_stride);
        if constexpr (r() == 0)
          tile_load<6 + c() % 2, B>(static_cast<const char*>(b) + c() * b_next, b_stride);
        tile_dot_bf16<r() * COLUMNS + c(), 4 + r(), 6 + c() % 2>();
      });
    });
  }
};

// Configures all eight tiles as 16 rows of 64 bytes in this thread, until the object is destroyed.
class Tiles {
 public:
  Tiles() {
    static constexpr TileConfig config;
    tiles_configure(config);
  }
  ~Tiles() { tiles_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace chunkllama
#else
namespace chunkllama {
struct Tiles {};
}  // namespace chunkllama
#endif
