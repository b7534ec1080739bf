// One parallel region per native call, on the OpenMP runtime that torch has already loaded; phases inside a region are
// separated by a barrier that spins shortly and then yields, because the API process may need this core.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace chunkllama {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
      if (spins < 1000) pause_cpu();
      else sched_yield();
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// A counter that hands out units of work; whoever has time takes the next.
struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
  int64_t take(int64_t count = 1) { return next.fetch_add(count, std::memory_order_relaxed); }
  int64_t taken() const { return next.load(std::memory_order_relaxed); }
};

// Runs work(thread, threads) on every thread of the team.
template <class F>
static inline void parallel(int threads, F&& work) {
  if (threads <= 1) {
    work(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
}

struct Range {
  int64_t begin, end;
};
static inline Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace chunkllama
