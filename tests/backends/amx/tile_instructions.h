// The instructions of kernels/cpu/tile_instructions.h in C++, for CPUs without AMX. The dot product
// sums in the order of the pairs and does not flush subnormal values.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace chunkllama {

enum Hint { KEEP, STREAM };

struct Tile {
  uint8_t rows[16][64];
};
inline thread_local Tile tile_registers[8];

template <int TILE, Hint HINT = KEEP>
static inline void tile_load(const void* p, long stride) {
  for (int r = 0; r < 16; r++)
    memcpy(tile_registers[TILE].rows[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int TILE>
static inline void tile_store(void* p, long stride) {
  for (int r = 0; r < 16; r++)
    memcpy(static_cast<char*>(p) + r * stride, tile_registers[TILE].rows[r], 64);
}
template <int TILE>
static inline void tile_zero() {
  memset(&tile_registers[TILE], 0, sizeof(Tile));
}
template <int SUM, int A, int B>
static inline void tile_dot_bf16() {
  float sum[16][16];
  bf16 a[16][16][2], b[16][16][2];
  memcpy(sum, &tile_registers[SUM], sizeof sum);
  memcpy(a, &tile_registers[A], sizeof a);
  memcpy(b, &tile_registers[B], sizeof b);
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int i = 0; i < 2; i++) sum[m][n] += to_float(a[m][k][i]) * to_float(b[k][n][i]);
  memcpy(&tile_registers[SUM], sum, sizeof sum);
}

struct TileConfig {};
static inline void tiles_configure(const TileConfig&) {}
// Registers that a kernel uses without configuring them again are NaN.
static inline void tiles_release() { memset(tile_registers, 0xff, sizeof tile_registers); }
static inline bool tiles_permitted() { return true; }

}  // namespace chunkllama
