// Runs the blocks of a CUDA grid on one CPU thread: every CUDA thread is a fiber with its own
// stack.
//
// A fiber runs until it meets a barrier (__syncthreads) or a warp collective; only there do fibers
// switch, in an order chosen by `schedule` (0 forward, 1 reverse, any other number seeds a
// shuffle). Blocks run one after another. So every run is deterministic, and code that is right
// only under one order of threads shows itself under another.
//
// Reported at once, by an abort with one line: divergent barriers or collectives (threads waiting
// at different source lines), deadlock, a thread that exits with copies in flight.
//
// Under -fsanitize=address fibers are announced to ASan; shared memory is a heap block of exactly
// the size asked for. Under -fsanitize=thread every fiber is a TSan thread and a switch orders
// nothing: only __syncthreads does. That is stricter than the schedules, which cannot miss a
// barrier that the order of switches happens to replace.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
extern "C" void __asan_unpoison_memory_region(void const volatile*, size_t);
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define EMULATOR_INTERNAL __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_INTERNAL
#endif

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Counters {
  int64_t mma, ldmatrix, bank_conflicts, copied_bytes, loaded_bytes, stored_bytes, barriers,
      switches;
};

struct Barrier {
  unsigned generation = 0;
  int arrived = 0, expected = 0, line = 0;
  // Addresses that carry TSan's ordering, by turns: a thread that runs ahead releases at the next
  // barrier before a slow one has acquired at this one, which must not order the slow one after
  // what came between.
  char order[2] = {};
};

// What the lanes of a warp hand in to a collective and get back. The last lane to arrive turns
// inputs into results, so a lane that runs ahead into the next collective overwrites its own input
// only, never a result not yet read.
struct Warp {
  Barrier barrier;
  uint32_t input[32][12], result[32][4];
  const void *row[32], *result_row[32];
};

struct Copy {
  void* destination;
  const void* source;
  bool valid;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  Dim3 thread;
  int lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  Barrier* waits_at = nullptr;
  unsigned waits_for = 0;      // generation that must pass
  std::vector<Copy> copies;    // asynchronous copies in flight, oldest first
  std::vector<size_t> groups;  // where each committed group ends in `copies`
  void *tsan = nullptr, *asan_fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

struct Block {
  Dim3 index;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::function<void()> body;
};

inline Counters counters;
inline int schedule = 0;
inline Dim3 grid_dim, block_dim;
inline Block block;
inline Fiber host;
inline Fiber* current = &host;

EMULATOR_INTERNAL inline void count(int64_t Counters::* counter, int64_t n = 1) {
  counters.*counter += n;
}

[[noreturn]] inline void fail(const char* message, long a, long b) {
  fprintf(stderr, "emulator: %s (%ld, %ld) in block (%u,%u,%u) thread %u\n", message, a, b,
          block.index.x, block.index.y, block.index.z, current->thread.x);
  fflush(stderr);
  abort();
}

#if defined(__x86_64__)
// Saves the callee-saved registers and swaps stacks: 32 ns a switch; swapcontext, with its system
// calls, takes 250.
extern "C" void emulation_swap(void** save, void* load);
asm(".text\n"
    ".weak emulation_swap\n"
    "emulation_swap:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");
constexpr int SAVED_REGISTERS = 6;
#else
#error "emulation_swap is written for x86-64"
#endif

EMULATOR_INTERNAL inline void switch_to(Fiber* to) {
  Fiber* from = current;
  current = to;
  counters.switches++;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->tsan, 1);  // 1: the switch orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->asan_fake_stack, to->stack_bottom,
                                 to->stack_size);
#endif
  emulation_swap(&from->stack_pointer, to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(current->asan_fake_stack, &bottom, &size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!host.stack_bottom) {
    host.stack_bottom = bottom;
    host.stack_size = size;
  }
#endif
  block.body();
  if (!current->copies.empty())
    fail("thread exits with asynchronous copies in flight", current->copies.size(), 0);
  current->done = true;
  switch_to(&host);
}

// True for the last thread to arrive, which may act for all before anyone else goes on.
EMULATOR_INTERNAL inline bool arrive(Barrier& barrier, int line) {
  if (barrier.arrived && barrier.line != line)
    fail("divergent barrier or warp collective, lines", barrier.line, line);
  barrier.line = line;
  if (++barrier.arrived < barrier.expected) return false;
  barrier.arrived = 0;
  return true;
}
EMULATOR_INTERNAL inline void release(Barrier& barrier) { barrier.generation++; }
EMULATOR_INTERNAL inline void wait(Barrier& barrier) {
  current->waits_at = &barrier;
  current->waits_for = barrier.generation;
  switch_to(&host);
}

inline void synchronize_block(int line) {
  count(&Counters::barriers);
#if defined(__SANITIZE_THREAD__)
  char* order = &block.barrier.order[block.barrier.generation & 1];
  __tsan_release(order);
#endif
  if (arrive(block.barrier, line)) release(block.barrier);
  else wait(block.barrier);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
}

// A warp collective: every lane has filled its input; the last one calls `act` for the warp. Orders
// no memory.
template <typename Act>
EMULATOR_INTERNAL inline void converge(int line, Act act) {
  Warp& warp = *current->warp;
  if (arrive(warp.barrier, line)) {
    act(warp);
    release(warp.barrier);
  } else {
    wait(warp.barrier);
  }
}

EMULATOR_INTERNAL inline void run_block() {
  const int n = (int)block.fibers.size();
  int left = n;
  std::vector<int> order(n);
  for (int i = 0; i < n; i++) order[i] = schedule == 1 ? n - 1 - i : i;
  std::mt19937 random(schedule);
  while (left) {
    if (schedule >= 2) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (int i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || (fiber.waits_at && fiber.waits_at->generation == fiber.waits_for)) continue;
      fiber.waits_at = nullptr;
      moved = true;
      switch_to(&fiber);
      left -= fiber.done;
    }
    if (moved) continue;
    for (Fiber& fiber : block.fibers)
      if (!fiber.done)
        fail("deadlock: line where a thread waits, threads left", fiber.waits_at->line, left);
  }
}

// Makes the host order before or after every fiber for TSan, as a kernel launch and its end do.
inline void order_host_and_fibers() {
#if defined(__SANITIZE_THREAD__)
  for (Fiber& fiber : block.fibers) {
    __tsan_switch_to_fiber(fiber.tsan, 0);
    __tsan_switch_to_fiber(host.tsan, 0);
  }
#endif
}

inline void reset_fiber(Fiber& fiber, int index) {
  fiber.done = false;
  fiber.waits_at = nullptr;
  fiber.thread = {(unsigned)index, 0, 0};
  fiber.lane = index & 31;
  fiber.warp = &block.warps[index / 32];
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.stack_bottom = fiber.stack.data();
  fiber.stack_size = fiber.stack.size();
  fiber.asan_fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // The fiber before on this stack never returned from its first frame, whose redzones are still
  // poisoned.
  __asan_unpoison_memory_region(fiber.stack.data(), fiber.stack.size());
#endif
  void** top = (void**)(((uintptr_t)fiber.stack.data() + fiber.stack.size()) & ~(uintptr_t)15);
  *--top = nullptr;
  *--top = (void*)fiber_main;  // where the first switch returns to
  top -= SAVED_REGISTERS;
  memset(top, 0, SAVED_REGISTERS * sizeof(void*));
  fiber.stack_pointer = top;
}

inline void launch_block(Dim3 index, int threads) {
  block.index = index;
  if (posix_memalign((void**)&block.shared, 128, block.shared_bytes ? block.shared_bytes : 1))
    abort();
  memset(block.shared, 0xff, block.shared_bytes);  // unwritten shared memory reads as NaN
  block.barrier = Barrier();
  block.barrier.expected = threads;
  for (Warp& warp : block.warps) {
    warp.barrier = Barrier();
    warp.barrier.expected = 32;
  }
  for (int i = 0; i < threads; i++) reset_fiber(block.fibers[i], i);
  order_host_and_fibers();
  run_block();
  order_host_and_fibers();
  free(block.shared);
  block.shared = nullptr;
}

// Runs `body` once per thread of the grid; threads must be a multiple of 32.
inline void launch(Dim3 grid, int threads, size_t shared_bytes, std::function<void()> body) {
  constexpr size_t STACK_BYTES = 64 << 10;
  grid_dim = grid;
  block_dim = {(unsigned)threads, 1, 1};
  block.body = std::move(body);
  block.shared_bytes = shared_bytes;
  block.warps.resize(threads / 32);
  block.fibers.resize(threads);
  for (Fiber& fiber : block.fibers) fiber.stack.resize(STACK_BYTES);
#if defined(__SANITIZE_THREAD__)
  host.tsan = __tsan_get_current_fiber();
  for (Fiber& fiber : block.fibers) fiber.tsan = __tsan_create_fiber(0);
#endif
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) launch_block({x, y, z}, threads);
#if defined(__SANITIZE_THREAD__)
  for (Fiber& fiber : block.fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
}

}  // namespace emulation
