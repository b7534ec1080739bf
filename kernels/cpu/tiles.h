// AMX tiles. Own macros, because gcc's intrinsics have no memory clobber: stores to a buffer could move past a load.
#pragma once
#if defined(__AMX_TILE__)
#include <cstdint>

#define TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((long)(stride)) : "memory")
// The same, for data that is not used again soon: it stays out of L1.
#define TILE_LOAD_STREAM(t, p, stride) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #t ::"r"(p), "r"((long)(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((long)(stride)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: )
#define TILE_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: )

namespace chunkllama {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All eight tiles 16 rows of 64 bytes, for as long as the object lives in this thread.
class Tiles {
 public:
  Tiles() {
    static constexpr TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" :::); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace chunkllama
#else
namespace chunkllama {
struct Tiles {};
}  // namespace chunkllama
#endif
