// A buffer that grows to the largest size requested and is freed with its thread.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace chunkllama {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* fit(size_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace chunkllama
