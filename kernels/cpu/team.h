// One parallel region per native call, on the OpenMP runtime that torch has already loaded. Inside
// it threads go from phase to phase without barriers: a phase is finished when all its work is
// done, by any of the threads. So a thread whose core runs another process (the API's, a client's)
// delays the others only if it was preempted while it worked on a unit.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

// Of libgomp. Called by name because Clang's `#pragma omp` needs another runtime than torch's.
extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace chunkllama {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Work in units that the threads take one by one. A thread that finds none left must not touch the
// phase's input: other threads may be overwriting it already.
class Phase {
 public:
  int64_t take(int64_t count = 1) {
    return taken_.count.fetch_add(count, std::memory_order_relaxed);
  }
  int64_t taken() const { return taken_.count.load(std::memory_order_relaxed); }
  void finish(int64_t count = 1) { finished_.count.fetch_add(count, std::memory_order_release); }
  // Returns when `total` units are finished; spins briefly, then yields the core.
  void wait(int64_t total) const {
    for (int spins = 0; finished_.count.load(std::memory_order_acquire) < total; spins++) {
      if (spins < 1000) pause_cpu();
      else sched_yield();
    }
  }
  // Runs work(begin, end) on `grain` units at a time until all are finished.
  template <class F>
  void run(int64_t total, int64_t grain, F&& work) {
    for (int64_t begin; (begin = take(grain)) < total;) {
      const int64_t end = begin + grain < total ? begin + grain : total;
      work(begin, end);
      finish(end - begin);
    }
    wait(total);
  }

 private:
  struct alignas(64) {
    std::atomic<int64_t> count{0};
  } taken_, finished_;
};

// Units for rows of little work: a few for each thread.
static inline int64_t row_grain(int64_t rows, int threads) {
  return (rows + 2 * threads - 1) / (2 * threads);
}

// Called between phases, where a thread holds no unit: the operating system then schedules another
// process here rather than in the middle of a unit.
static inline void yield_core() { sched_yield(); }

// Runs work(thread, threads) on every thread of the team.
template <class F>
static inline void parallel(int threads, F&& work) {
  if (threads <= 1) {
    work(0, 1);
    return;
  }
  using Work = std::remove_reference_t<F>;
  const auto call = [](void* data) {
    (*static_cast<Work*>(data))(omp_get_thread_num(), omp_get_num_threads());
  };
  void* data = const_cast<std::remove_const_t<Work>*>(&work);
  GOMP_parallel(call, data, static_cast<unsigned>(threads), 0);
}

struct Range {
  int64_t begin, end;
};
static inline Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace chunkllama
