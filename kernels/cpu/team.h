// One parallel region per native call, on the OpenMP runtime that torch has already loaded. Inside it threads go from phase
// to phase without meeting: a phase is over when all its work is done, whoever did it. So a thread whose core serves another
// process (the API's, a client's) holds nobody up before the region's end, unless it was stopped in the midst of a unit.
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

// Work in units that whoever has time takes. Who finds none left must touch nothing of the phase's input: others may be
// overwriting it already.
class Phase {
 public:
  int64_t take(int64_t count = 1) { return taken_.count.fetch_add(count, std::memory_order_relaxed); }
  int64_t taken() const { return taken_.count.load(std::memory_order_relaxed); }
  void finish(int64_t count = 1) { finished_.count.fetch_add(count, std::memory_order_release); }
  // Until `total` units are finished: spins shortly, then lets others have the core.
  void wait(int64_t total) const {
    for (int spins = 0; finished_.count.load(std::memory_order_acquire) < total; spins++) {
      if (spins < 1000) pause_cpu();
      else sched_yield();
    }
  }
  // All of it: work(begin, end) for `grain` units at a time.
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
static inline int64_t row_grain(int64_t rows, int threads) { return (rows + 2 * threads - 1) / (2 * threads); }

// To be called between phases, where a thread holds no unit: another process gets the core now rather than amid a unit.
static inline void give_way() { sched_yield(); }

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
