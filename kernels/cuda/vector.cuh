// Eight 16-bit floats as one 16-byte access, widened to float32.
#pragma once
#include "device.cuh"

constexpr int VECTOR = 8;  // elements of a 16-byte access

template <typename T>
DEVICE void unpack8(float (&values)[VECTOR], uint4 packed) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = Element<T>::low(words[i]);
    values[2 * i + 1] = Element<T>::high(words[i]);
  }
}

template <typename T>
DEVICE uint4 pack8(const float (&values)[VECTOR]) {
  uint4 packed;
  packed.x = Element<T>::pack2(values[0], values[1]);
  packed.y = Element<T>::pack2(values[2], values[3]);
  packed.z = Element<T>::pack2(values[4], values[5]);
  packed.w = Element<T>::pack2(values[6], values[7]);
  return packed;
}
