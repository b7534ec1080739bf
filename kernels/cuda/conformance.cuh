// Every wrapper of the device layer once, on given inputs: run on a GPU and compared with the
// emulator's stored answers (benchmarks/gpu.py check), this shows that PTX and emulation
// mean the same.
#pragma once
#include "device.cuh"

constexpr int CONFORMANCE_WORDS = 32;  // u32 results per lane

struct ConformanceParams {
  const void* elements;  // [64, 8] 16-bit floats
  const float* numbers;  // [32, 8]: two to pack, exp2, log2 and rsqrt arguments, a value to
                         // shuffle, two of C
  u32* results;          // [32, CONFORMANCE_WORDS]
};

// One warp. Elements 0..31 and 32..63 become two groups of four 8x8 matrices in shared memory; the
// copy of row 5 is marked invalid and must read as zeros.
template <typename T>
KERNEL(32, 1)
conformance(ConformanceParams p) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  const unsigned char* source = (const unsigned char*)p.elements;
  const u32 address = shared_address(shared) + lane * 16;
  copy_async16<false>(address, source + lane * 16, lane != 5);
  copy_async_commit();
  copy_async16<true>(address + 512, source + 512 + lane * 16, true);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  u32 a[4], b[4], transposed[4];
  ldmatrix_x4<false>(a, address);
  ldmatrix_x4<true>(transposed, address);
  copy_async_wait<0>();
  __syncthreads();
  ldmatrix_x4<false>(b, address + 512);

  const float* numbers = p.numbers + lane * 8;
  float c[4] = {numbers[6], numbers[7], 0.f, 1.f};
  Element<T>::mma(c, a, b[0], b[1]);
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  Element<T>::mma(d, transposed, b[2], b[3]);

  u32* out = p.results + lane * CONFORMANCE_WORDS;
  const u32 packed = Element<T>::pack2(numbers[0], numbers[1]);
  const uint4 copied = load16(source + lane * 16);
  for (int i = 0; i < 4; i++) {
    out[i] = a[i];
    out[4 + i] = transposed[i];
    out[8 + i] = b[i];
    ((float*)out)[12 + i] = c[i];
    ((float*)out)[16 + i] = d[i];
  }
  store16(out + 20, copied);
  out[24] = packed;
  float* values = (float*)out;
  values[25] = Element<T>::low(packed);
  values[26] = Element<T>::high(packed);
  values[27] = exp2_fast(numbers[2]);
  values[28] = log2_fast(numbers[3]);
  values[29] = rsqrt_fast(numbers[4]);
  values[30] = shuffle_xor(numbers[5], 3);
  const bool votes = any_lane(lane == 5) && !any_lane(false);
  values[31] = votes ? exp2_fast(NEGATIVE_INFINITY) : 1.f;
}
