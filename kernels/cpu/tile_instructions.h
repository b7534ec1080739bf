// AMX instructions, as inline assembly because gcc's intrinsics have no memory clobber: stores to a
// buffer could move past a load. Tests on CPUs without AMX replace this file.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "vec.h"

namespace chunkllama {

enum Hint { KEEP, STREAM };  // STREAM: data that is not used again soon stays out of L1

template <int TILE, Hint HINT = KEEP>
static INLINE void tile_load(const void* p, long stride) {
  if constexpr (HINT == KEEP)
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
  else asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static INLINE void tile_store(void* p, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int SUM, int A, int B>
static INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static INLINE void tiles_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
static INLINE void tiles_release() { asm volatile("tilerelease" :::); }

// Whether the operating system permits the tile state, which it may refuse.
static INLINE bool tiles_permitted() {
  constexpr long request_permission = 0x1023,
                 tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace chunkllama
