// Host side of translated PTX: the ABI of kernels/emulation/host.cpp, so that one launcher drives
// either.
//
// TRANSLATED names the generated functions, TABLE one line
// KERNEL_OF(name expression, function, bytes of parameters, threads) per kernel.
#include "ptx_machine.h"
using namespace ptx;

// With -DPTX_COVERAGE, `coverage` hands out which lines of a kernel's PTX have run.
#ifdef PTX_COVERAGE
#define COVERAGE_OF(FUNCTION, LINES) static unsigned char covered_##FUNCTION[LINES];
#define USE_COVERAGE(FUNCTION) unsigned char* const covered = covered_##FUNCTION;
#define COVER(LINE) covered[LINE] = 1;
#else
#define COVERAGE_OF(FUNCTION, LINES)
#define USE_COVERAGE(FUNCTION)
#define COVER(LINE)
#endif
#include TRANSLATED

#define EXPORT extern "C" __attribute__((visibility("default")))

struct TranslatedKernel {
  const char* name;
  size_t params_bytes;
  int max_threads;
  void (*run)(const unsigned char*);
};
#define KERNEL_OF(EXPRESSION, FUNCTION, BYTES, THREADS) {EXPRESSION, BYTES, THREADS, FUNCTION},
static const TranslatedKernel kernels[] = {
#include TABLE
};
#undef KERNEL_OF

EXPORT void set_arithmetic(int units, int truncating) {
  approximate_units = units;
  truncating_mma = truncating != 0;
}

// 0, or -1 for a kernel this library does not hold, -2 for a parameter struct of another size, -3
// for more threads than the kernel is compiled for.
EXPORT int emulate(const char* name, const unsigned* grid, int threads, size_t shared_bytes,
                   const void* params, size_t params_bytes, int schedule,
                   emulation::Counters* counters) {
  for (const TranslatedKernel& kernel : kernels) {
    if (strcmp(kernel.name, name)) continue;
    if (kernel.params_bytes != params_bytes) return -2;
    if (threads > kernel.max_threads) return -3;
    const unsigned char* first = (const unsigned char*)params;
    const std::vector<unsigned char> copy(first, first + params_bytes);
    emulation::schedule = schedule;
    emulation::counters = *counters;
    emulation::launch({grid[0], grid[1], grid[2]}, threads, shared_bytes,
                      [&] { kernel.run(copy.data()); });
    *counters = emulation::counters;
    return 0;
  }
  return -1;
}

#ifdef PTX_COVERAGE
// The bytes of a kernel's lines, 1 where one has run; their number is returned.
EXPORT size_t coverage(const char* name, const unsigned char** lines) {
#define KERNEL_OF(EXPRESSION, FUNCTION, BYTES, THREADS) \
  if (!strcmp(name, EXPRESSION)) {                      \
    *lines = covered_##FUNCTION;                        \
    return sizeof covered_##FUNCTION;                   \
  }
#include TABLE
  return 0;
}
#endif
