// What PTX instructions mean: one C++ function each, called by the code that ptx_translator.py
// makes of NVRTC's output.
//
// Threads are the fibers of kernels/emulation/fibers.h. Nothing of cuda/device.cuh or
// emulation/device.h is used: what runs here is held to the PTX ISA, not to the C++ machine that the
// kernels were written with. A site of a barrier or collective is its line in the PTX, so one that
// the compiler has duplicated onto two paths of a warp shows itself as divergent.
#pragma once
#include <cmath>

#include "fibers.h"

namespace ptx {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

using emulation::block;
using emulation::current;
using emulation::fail;

// Dynamic shared memory does not begin at 0 on hardware either: an address that lost its base is
// noticed.
constexpr u32 SHARED_BASE = 1024;

// How far the arithmetic departs from exact: a relative error in units of 2^-23 on ex2, lg2 and
// rsqrt, and mma that aligns its terms to the largest and truncates, as tensor cores do.
inline int approximate_units = 0;
inline bool truncating_mma = false;

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Memory. A vector access must be aligned to its whole size (PTX ISA, "Vectors").
inline unsigned char* shared_bytes(u64 address, size_t bytes, int line) {
  if (address % bytes) fail("shared access misaligned, PTX line", line, (long)address);
  if (address < SHARED_BASE || address + bytes > SHARED_BASE + block.shared_bytes)
    fail("shared access outside, PTX line", line, (long)address);
  return block.shared + (address - SHARED_BASE);
}
template <class T>
inline T* shared_pointer(u64 address, int count, int line) {
  return (T*)shared_bytes(address, sizeof(T) * count, line);
}
template <class T>
inline T* global_pointer(u64 address, int count, int line) {
  if (address % (sizeof(T) * count))
    fail("global access misaligned, PTX line", line, (long)address);
  if (address < 65536) fail("global access near null, PTX line", line, (long)address);
  return (T*)address;
}
template <class T>
inline T param(const unsigned char* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

// ---- Float arithmetic; .ftz flushes subnormal inputs and results to zero of the same sign.
inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}
inline float add_ftz(float a, float b) { return flush(flush(a) + flush(b)); }
inline float sub_ftz(float a, float b) { return flush(flush(a) - flush(b)); }
inline float mul_ftz(float a, float b) { return flush(flush(a) * flush(b)); }
inline float fma_ftz(float a, float b, float c) {
  return flush(std::fma(flush(a), flush(b), flush(c)));
}
inline float div_ftz(float a, float b) { return flush(flush(a) / flush(b)); }
inline float rcp_ftz(float a) { return flush(1.f / flush(a)); }
inline float max_ftz(float a, float b) { return std::fmax(flush(a), flush(b)); }
inline float min_ftz(float a, float b) { return std::fmin(flush(a), flush(b)); }
inline float neg_ftz(float a) { return -flush(a); }
inline float abs_ftz(float a) { return std::fabs(flush(a)); }

// An exact value with the error asked for, whose sign depends on the argument.
inline float approximate(float exact, float argument) {
  if (!approximate_units || !std::isfinite(exact)) return exact;
  const float sign = bits<u32>(argument) * 2654435761u >> 31 ? 1.f : -1.f;
  return exact * (1.f + sign * (float)approximate_units * 0x1p-23f);
}
inline float ex2_ftz(float x) { return flush(approximate(std::exp2(flush(x)), x)); }
inline float lg2_ftz(float x) { return flush(approximate(std::log2(flush(x)), x)); }
inline float rsqrt_ftz(float x) { return flush(approximate(1.f / std::sqrt(flush(x)), x)); }

inline u16 f16_of(float x) { return x != x ? 0x7fff : bits<u16>((_Float16)x); }
inline u16 bf16_of(float x) {
  const u32 b = bits<u32>(x);
  return x != x ? 0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline float of_f16(u16 x) { return (float)bits<_Float16>(x); }
inline float of_bf16(u16 x) { return bits<float>((u32)x << 16); }
// The first source becomes the upper half of the destination (PTX ISA, "cvt").
inline u32 pack_f16(float a, float b) { return (u32)f16_of(a) << 16 | f16_of(b); }
inline u32 pack_bf16(float a, float b) { return (u32)bf16_of(a) << 16 | bf16_of(b); }

// ---- Integers
inline u32 bfi(u32 a, u32 b, u32 position, u32 length) {
  u32 result = b;
  for (u32 i = 0; i < (length & 255) && (position & 255) + i < 32; i++) {
    const u32 mask = 1u << ((position & 255) + i);
    result = (result & ~mask) | ((a >> i & 1) ? mask : 0);
  }
  return result;
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 source = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 choice = selector >> (4 * i) & 15;
    const u8 byte = (u8)(source >> (8 * (choice & 7)));
    result |= (u32)(choice & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
  }
  return result;
}
template <class T>
inline T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? 0 : (T)(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? (T)-1 : (T)0;
  return (T)(a >> n);
}
template <class T>
inline T divide(T a, T b, int line) {
  if (b == 0) fail("division by zero, PTX line", line, (long)a);
  return b == (T)-1 && (T)-1 < 0 ? (T)(0 - (u64)a) : a / b;
}
template <class T>
inline T remainder(T a, T b, int line) {
  if (b == 0) fail("division by zero, PTX line", line, (long)a);
  return b == (T)-1 && (T)-1 < 0 ? 0 : a % b;
}

// ---- Barriers and collectives of whole warps
inline void barrier(int line) { emulation::synchronize_block(line); }

inline void require_whole_warp(u32 members, int line) {
  if (members != 0xffffffffu)
    fail("a collective of a part of a warp, PTX line", line, (long)members);
}
struct ExchangeLanes {
  u32 lane_mask;
  EMULATOR_INTERNAL void operator()(emulation::Warp& w) const {
    for (u32 l = 0; l < 32; l++) w.result[l][0] = w.input[l ^ lane_mask][0];
  }
};
EMULATOR_INTERNAL inline u32 shuffle_bfly(u32 value, u32 lane_mask, u32 clamp, u32 members,
                                          int line) {
  require_whole_warp(members, line);
  if (clamp != 31) fail("a shuffle of segments, PTX line", line, (long)clamp);
  emulation::Warp& warp = *current->warp;
  const int lane = current->lane;
  warp.input[lane][0] = value;
  emulation::converge(line, ExchangeLanes{lane_mask & 31});
  return warp.result[lane][0];
}

EMULATOR_INTERNAL inline void join_votes(emulation::Warp& w) {
  u32 any = 0;
  for (int l = 0; l < 32; l++) any |= w.input[l][0];
  for (int l = 0; l < 32; l++) w.result[l][0] = any;
}
EMULATOR_INTERNAL inline bool vote_any(bool value, u32 members, int line) {
  require_whole_warp(members, line);
  emulation::Warp& warp = *current->warp;
  const int lane = current->lane;
  warp.input[lane][0] = value;
  emulation::converge(line, join_votes);
  return warp.result[lane][0] != 0;
}

// ldmatrix .m8n8.x4.b16: lanes 8 i .. 8 i + 7 hold the addresses of the rows of matrix i; lane l
// receives of each matrix the elements (l / 4, 2 (l % 4)) and its right neighbour; .trans: of the
// transposed matrix. The eight rows of a matrix are read in one go.
EMULATOR_INTERNAL inline void gather_rows(emulation::Warp& w) {
  for (int l = 0; l < 32; l++) w.result_row[l] = w.row[l];
  for (int matrix = 0; matrix < 4; matrix++) {
    int hits[8] = {}, worst = 0;
    for (int r = 0; r < 8; r++)
      worst = std::max(worst, ++hits[(uintptr_t)w.row[8 * matrix + r] / 16 % 8]);
    emulation::count(&emulation::Counters::bank_conflicts, worst - 1);
  }
  emulation::count(&emulation::Counters::ldmatrix);
}
EMULATOR_INTERNAL inline void publish_row(const void* row, int line) {
  current->warp->row[current->lane] = row;
  emulation::converge(line, gather_rows);
}
EMULATOR_INTERNAL inline const u16* published_row(int i) {
  return (const u16*)current->warp->result_row[i];
}
template <bool TRANSPOSED>
inline void ldmatrix_x4(u32 (&d)[4], u64 address, int line) {
  publish_row(shared_bytes(address, 16, line), line);
  const int row = current->lane / 4, column = current->lane % 4 * 2;
  for (int m = 0; m < 4; m++) {
    const u16 low =
        TRANSPOSED ? published_row(8 * m + column)[row] : published_row(8 * m + row)[column];
    const u16 high = TRANSPOSED ? published_row(8 * m + column + 1)[row]
                                : published_row(8 * m + row)[column + 1];
    d[m] = (u32)high << 16 | low;
  }
}

// c plus the products, in one addition that keeps one bit below float32's last of the largest term.
inline float add_truncating(const float* terms, int count) {
  int largest = INT32_MIN;
  for (int i = 0; i < count; i++) {
    if (!std::isfinite(terms[i])) {
      float sum = 0.f;
      for (int j = 0; j < count; j++) sum += terms[j];
      return sum;
    }
    if (terms[i] != 0.f) largest = std::max(largest, std::ilogb(terms[i]));
  }
  if (largest == INT32_MIN) return 0.f;
  const int shift = 24 - largest;
  s64 sum = 0;
  for (int i = 0; i < count; i++) sum += (s64)std::trunc(std::ldexp((double)terms[i], shift));
  const double value = std::ldexp((double)sum, -shift);
  const float rounded = (float)value;
  return std::fabs((double)rounded) > std::fabs(value) ? std::nextafter(rounded, 0.f) : rounded;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": group = lane >> 2,
// t = lane % 4,
//   A, element i of 8: row = group (+ 8 for i in {2, 3, 6, 7}), k = 2 t + (i & 1) (+ 8 for i >= 4)
//   B, element i of 4: k = 2 t + (i & 1) (+ 8 for i >= 2), column = group
//   C, element i of 4: row = group (+ 8 for i >= 2), column = 2 t + (i & 1)
template <bool BF16>
EMULATOR_INTERNAL inline void multiply(emulation::Warp& w) {
  float a[16][16], b[16][8];
  auto widen = [](u32 word, int half) {
    const u16 x = (u16)(word >> (16 * half));
    return BF16 ? of_bf16(x) : of_f16(x);
  };
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane >> 2, t = lane % 4;
    for (int i = 0; i < 8; i++)
      a[group + (i & 2 ? 8 : 0)][2 * t + (i & 1) + (i >= 4 ? 8 : 0)] =
          widen(w.input[lane][i / 2], i & 1);
    for (int i = 0; i < 4; i++)
      b[2 * t + (i & 1) + (i >= 2 ? 8 : 0)][group] = widen(w.input[lane][4 + i / 2], i & 1);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + (i & 1);
      float c = bits<float>(w.input[lane][6 + i]);
      if (truncating_mma) {
        for (int k = 0; k < 16; k += 8) {
          float terms[9] = {c};
          for (int n = 0; n < 8; n++) terms[1 + n] = a[row][k + n] * b[k + n][column];
          c = add_truncating(terms, 9);
        }
      } else {
        double sum = c;
        for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k][column];
        c = (float)sum;
      }
      w.result[lane][i] = bits<u32>(c);
    }
  emulation::count(&emulation::Counters::mma);
}
template <bool BF16>
EMULATOR_INTERNAL inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                  const float (&c)[4], int line) {
  emulation::Warp& warp = *current->warp;
  const int lane = current->lane;
  for (int i = 0; i < 4; i++) warp.input[lane][i] = a[i];
  for (int i = 0; i < 2; i++) warp.input[lane][4 + i] = b[i];
  for (int i = 0; i < 4; i++) warp.input[lane][6 + i] = bits<u32>(c[i]);
  emulation::converge(line, multiply<BF16>);
  for (int i = 0; i < 4; i++) d[i] = bits<float>(warp.result[lane][i]);
}

// ---- cp.async: the destination reads as NaN from the copy's issue to the wait that covers it.
// Plain stores: the sanitizers do not see what a compiler makes of a 16-byte memset or memcpy.
inline void store_words(void* destination, u64 first, u64 second) {
  ((u64*)destination)[0] = first;
  ((u64*)destination)[1] = second;
}
inline void cp_async16(u64 destination, u64 source, u32 source_bytes, int line) {
  if (source_bytes != 0 && source_bytes != 16)
    fail("cp.async of a part of 16 bytes, PTX line", line, (long)source_bytes);
  if (source_bytes && source % 16) fail("cp.async misaligned, PTX line", line, (long)source);
  void* to = shared_bytes(destination, 16, line);
  store_words(to, ~0ull, ~0ull);
  current->copies.push_back({to, (const void*)source, source_bytes == 16});
  if (source_bytes) emulation::count(&emulation::Counters::copied_bytes, 16);
}
inline void cp_async_commit() { current->groups.push_back(current->copies.size()); }
inline void cp_async_wait(size_t pending) {
  emulation::Fiber& fiber = *current;
  if (fiber.groups.size() <= pending) return;
  const size_t landed_groups = fiber.groups.size() - pending,
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

}  // namespace ptx
