// The device layer: everything the kernels need from the hardware, and the only file with PTX.
//
// Two compilers read the kernels. NVRTC takes the inline PTX below and no CUDA header at all, so it
// needs no include path. g++ with -DCHUNKLLAMA_EMULATE takes the same names from emulation/device.h
// and runs them on a CPU.
//
// Rules that keep this working: no CUDA headers, no PTX elsewhere, dynamic shared memory only,
// kernels take one struct by value, warp collectives (ldmatrix, mma, shuffle_xor, any_lane) only in
// warp-uniform code, no printf, no assert.
#pragma once
#ifdef CHUNKLLAMA_EMULATE
#include "../emulation/device.h"
#else

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};

// An address in shared memory for the instructions below: 32 bits, so that arithmetic on it is half
// that on a pointer.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
// The same number, which the compiler has to keep instead of computing it again where it is used.
DEVICE u32 kept(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- Global memory, 16 bytes at a time (addresses must be multiples of 16).
DEVICE uint4 load16(const void* source) { return *(const uint4*)source; }
DEVICE void store16(void* destination, uint4 value) { *(uint4*)destination = value; }

// ---- Asynchronous copies: 16 bytes, global to shared, past L1. An invalid copy reads nothing and
// writes zeros; with ALWAYS all are valid.
template <bool ALWAYS>
DEVICE void copy_async16(u32 destination, const void* source, bool valid) {
  if (ALWAYS)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(destination), "l"(source)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most PENDING of this thread's newest groups are still under way.
template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// ---- Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
template <bool TRANSPOSED>
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// ---- 16-bit floats: two in a register, arithmetic in float32, c += a b on tensor cores (m16n8k16,
// row x col).
template <typename T>
struct Element;

template <>
struct Element<bf16> {
  static constexpr u32 ONES = 0x3f803f80;  // two of them
  static DEVICE u32 pack2(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float low(u32 packed) { return __uint_as_float(packed << 16); }
  static DEVICE float high(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Element<fp16> {
  static constexpr u32 ONES = 0x3c003c00;
  static DEVICE u32 pack2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float widen(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(bits));
    return value;
  }
  static DEVICE float low(u32 packed) { return widen((u16)packed); }
  static DEVICE float high(u32 packed) { return widen((u16)(packed >> 16)); }
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// ---- Fast float32 functions: 2^x, log2(x), 1 / sqrt(x); relative error below 2^-21.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }

DEVICE float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
DEVICE u32 shuffle_xor(u32 value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
// Whether `value` holds in a lane of the warp.
DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }

#endif
