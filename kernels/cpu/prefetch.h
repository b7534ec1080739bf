// Spreads prefetches of the next data over the work on the current data. Bursts fill the L1 fill
// buffers and limit a core to about 7 GB/s; paced through the arithmetic they cost nothing.
#pragma once
#include "vec.h"

namespace chunkllama {

class Prefetcher {
 public:
  void clear() { count_ = current_ = credit_ = rate_ = 0, offset_ = 0, lines_ = 0; }
  void add(const void* p, size_t bytes) {
    if (count_ == MAX || bytes == 0) return;
    base_[count_] = static_cast<const char*>(p);
    bytes_[count_++] = bytes;
    lines_ += (bytes + 63) / 64;
  }
  // After the last add(): the lines are fetched evenly over that many places. The work calls step()
  // at each place; a long stretch of work counts as several places.
  void spread(int places) { rate_ = (int(lines_) * LINE + places - 1) / places; }
  INLINE void step(int places = 1) {
    credit_ += rate_ * places;
    for (; credit_ >= LINE && current_ < count_; credit_ -= LINE) fetch();
  }
  void finish() {
    while (current_ < count_) fetch();
  }

 private:
  INLINE void fetch() {
    prefetch_l2(base_[current_] + offset_);
    offset_ += 64;
    if (offset_ >= bytes_[current_]) offset_ = 0, current_++;
  }
  static constexpr int MAX = 6;
  static constexpr int LINE = 16;  // credit for a line
  const char* base_[MAX];
  size_t bytes_[MAX];
  size_t offset_ = 0, lines_ = 0;
  int count_ = 0, current_ = 0, credit_ = 0, rate_ = 0;
};

}  // namespace chunkllama
