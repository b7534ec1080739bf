// The CPU counterpart of cuda/device.cuh: the same names with the same meaning, on fibers.
//
// Where the hardware tolerates an error or races, the emulation is strict: an asynchronous copy
// poisons its destination with NaN when it is issued and lands only at the wait that covers it;
// addresses must be aligned and inside shared memory. Counted: bytes of asynchronous copies, of
// 16-byte loads and stores, bank conflicts of every ldmatrix, mma.
#pragma once
#include <cmath>

#include "fibers.h"

typedef uint32_t u32;
typedef uint16_t u16;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define KERNEL(threads, min_ctas) void
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::block.shared
#define NEGATIVE_INFINITY (-INFINITY)

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block.index)
#define gridDim (emulation::grid_dim)
#define blockDim (emulation::block_dim)

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};

inline float as_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline u32 as_bits(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::synchronize_block(line); }

// ---- Global memory
inline uint4 load16(const void* source) {
  if ((uintptr_t)source & 15) emulation::fail("load16 misaligned", 0, 0);
  emulation::count(&emulation::Counters::loaded_bytes, 16);
  return *(const uint4*)source;
}
inline void store16(void* destination, uint4 value) {
  if ((uintptr_t)destination & 15) emulation::fail("store16 misaligned", 0, 0);
  emulation::count(&emulation::Counters::stored_bytes, 16);
  *(uint4*)destination = value;
}

// ---- Asynchronous copies
// Shared memory does not begin at 0 on hardware either.
constexpr u32 SHARED_BASE = 1024;
inline u32 shared_address(const void* pointer) {
  return SHARED_BASE + (u32)((const unsigned char*)pointer - emulation::block.shared);
}
inline u32 kept(u32 value) { return value; }
// Sixteen bytes of shared memory.
inline unsigned char* shared_bytes(u32 address, const char* misaligned, const char* outside) {
  if (address & 15) emulation::fail(misaligned, address, 0);
  if (address < SHARED_BASE || address - SHARED_BASE + 16 > emulation::block.shared_bytes)
    emulation::fail(outside, address, 0);
  return emulation::block.shared + (address - SHARED_BASE);
}
// Plain stores: the sanitizers do not see what a compiler makes of a 16-byte memset or memcpy.
inline void store_words(void* destination, u64 first, u64 second) {
  ((u64*)destination)[0] = first;
  ((u64*)destination)[1] = second;
}
template <bool ALWAYS>
inline void copy_async16(u32 address, const void* source, bool valid) {
  if (ALWAYS && !valid) emulation::fail("cp.async of a copy that is not valid", 0, 0);
  if (valid && (uintptr_t)source & 15) emulation::fail("cp.async source misaligned", 0, 0);
  void* destination = shared_bytes(address, "cp.async destination misaligned",
                                   "cp.async destination outside shared memory");
  store_words(destination, ~0ull, ~0ull);
  emulation::current->copies.push_back({destination, source, valid});
  if (valid) emulation::count(&emulation::Counters::copied_bytes, 16);
}
inline void copy_async_commit() {
  emulation::Fiber& fiber = *emulation::current;
  fiber.groups.push_back(fiber.copies.size());
}
template <int PENDING>
inline void copy_async_wait() {
  emulation::Fiber& fiber = *emulation::current;
  if (fiber.groups.size() <= PENDING) return;
  const size_t landed_groups = fiber.groups.size() - PENDING,
               landed = fiber.groups[landed_groups - 1];
  for (size_t i = 0; i < landed; i++) {
    const emulation::Copy& copy = fiber.copies[i];
    if (copy.valid)
      store_words(copy.destination, ((const u64*)copy.source)[0], ((const u64*)copy.source)[1]);
    else store_words(copy.destination, 0, 0);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + landed);
  fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + landed_groups);
  for (size_t& end : fiber.groups) end -= landed;
}

// ---- ldmatrix: lane 4 g + t gets elements 2 t and 2 t + 1 of row g of each matrix; transposed, of
// column g. The eight rows of a matrix are read in one go, so each should lie in other banks than
// the rest.
EMULATOR_INTERNAL inline void gather_rows(emulation::Warp& warp) {
  for (int lane = 0; lane < 32; lane++) warp.result_row[lane] = warp.row[lane];
  for (int matrix = 0; matrix < 4; matrix++) {
    int hits[8] = {}, worst = 0;
    for (int r = 0; r < 8; r++)
      worst = std::max(worst, ++hits[(uintptr_t)warp.row[8 * matrix + r] / 16 % 8]);
    emulation::count(&emulation::Counters::bank_conflicts, worst - 1);
  }
  emulation::count(&emulation::Counters::ldmatrix);
}
EMULATOR_INTERNAL inline void hand_in_row(const void* row) {
  emulation::current->warp->row[emulation::current->lane] = row;
}
EMULATOR_INTERNAL inline const u16* gathered_row(int i) {
  return (const u16*)emulation::current->warp->result_row[i];
}
template <bool TRANSPOSED>
inline void ldmatrix_x4(u32 (&r)[4], u32 row, int line = __builtin_LINE()) {
  hand_in_row(
      shared_bytes(row, "ldmatrix address misaligned", "ldmatrix address outside shared memory"));
  emulation::converge(line, gather_rows);
  const int g = emulation::current->lane / 4, t = emulation::current->lane % 4;
  for (int i = 0; i < 4; i++) {
    if (TRANSPOSED)
      r[i] = gathered_row(8 * i + 2 * t)[g] | (u32)gathered_row(8 * i + 2 * t + 1)[g] << 16;
    else r[i] = gathered_row(8 * i + g)[2 * t] | (u32)gathered_row(8 * i + g)[2 * t + 1] << 16;
  }
}

// ---- 16-bit floats and mma
template <typename T>
struct Element;

// PTX's m16n8k16 fragments, lane = 4 g + t, two elements a register.
//   A: a0 = (row g, k 2t..), a1 = (row g + 8, k 2t..), a2 = (row g, k 2t + 8..), a3 = (row g + 8, k
//   2t + 8..) B: b0 = (k 2t.., column g), b1 = (k 2t + 8.., column g) C: c0, c1 = (row g, columns
//   2t, 2t + 1), c2, c3 = (row g + 8, the same columns)
template <typename T>
EMULATOR_INTERNAL inline void multiply_warp(emulation::Warp& warp) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      float* pair = &a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)];
      pair[0] = Element<T>::low(warp.input[lane][i]);
      pair[1] = Element<T>::high(warp.input[lane][i]);
    }
    for (int i = 0; i < 2; i++) {
      b[g][2 * t + 8 * i] = Element<T>::low(warp.input[lane][4 + i]);
      b[g][2 * t + 8 * i + 1] = Element<T>::high(warp.input[lane][4 + i]);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const float *row = a[lane / 4 + 8 * (i >> 1)], *column = b[lane % 4 * 2 + (i & 1)];
      float sum = as_float(warp.input[lane][6 + i]);
      for (int k = 0; k < 16; k++) sum += row[k] * column[k];
      warp.result[lane][i] = as_bits(sum);
    }
  emulation::count(&emulation::Counters::mma);
}
template <typename T>
EMULATOR_INTERNAL inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line) {
  emulation::Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; i++) warp.input[lane][i] = a[i];
  warp.input[lane][4] = b0;
  warp.input[lane][5] = b1;
  for (int i = 0; i < 4; i++) warp.input[lane][6 + i] = as_bits(c[i]);
  emulation::converge(line, multiply_warp<T>);
  for (int i = 0; i < 4; i++) c[i] = as_float(warp.result[lane][i]);
}

template <>
struct Element<bf16> {
  static constexpr u32 ONES = 0x3f803f80;
  static u32 encode(float value) {  // round to nearest even
    const u32 bits = as_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static u32 pack2(float low, float high) { return encode(low) | encode(high) << 16; }
  static float low(u32 packed) { return as_float(packed << 16); }
  static float high(u32 packed) { return as_float(packed & 0xffff0000u); }
  static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
    multiply<bf16>(c, a, b0, b1, line);
  }
};

template <>
struct Element<fp16> {
  static constexpr u32 ONES = 0x3c003c00;
  static u32 encode(float value) {
    const _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return value != value ? 0x7fff : bits;
  }
  static float widen(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
  }
  static u32 pack2(float low, float high) { return encode(low) | encode(high) << 16; }
  static float low(u32 packed) { return widen((u16)packed); }
  static float high(u32 packed) { return widen((u16)(packed >> 16)); }
  static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
    multiply<fp16>(c, a, b0, b1, line);
  }
};

// ---- Fast float32 functions and shuffles
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float rsqrt_fast(float x) { return 1.f / sqrtf(x); }
inline u32 float_bits(float x) { return as_bits(x); }

struct ExchangeLanes {
  int lane_mask;
  EMULATOR_INTERNAL void operator()(emulation::Warp& warp) const {
    for (int lane = 0; lane < 32; lane++) warp.result[lane][0] = warp.input[lane ^ lane_mask][0];
  }
};
EMULATOR_INTERNAL inline u32 shuffle_xor(u32 value, int lane_mask, int line = __builtin_LINE()) {
  emulation::Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  warp.input[lane][0] = value;
  emulation::converge(line, ExchangeLanes{lane_mask});
  return warp.result[lane][0];
}
EMULATOR_INTERNAL inline float shuffle_xor(float value, int lane_mask,
                                           int line = __builtin_LINE()) {
  return as_float(shuffle_xor(as_bits(value), lane_mask, line));
}

EMULATOR_INTERNAL inline void join_votes(emulation::Warp& warp) {
  u32 any = 0;
  for (int lane = 0; lane < 32; lane++) any |= warp.input[lane][0];
  for (int lane = 0; lane < 32; lane++) warp.result[lane][0] = any;
}
EMULATOR_INTERNAL inline bool any_lane(bool value, int line = __builtin_LINE()) {
  emulation::Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  warp.input[lane][0] = value;
  emulation::converge(line, join_votes);
  return warp.result[lane][0] != 0;
}
