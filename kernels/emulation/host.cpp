// Host side of the emulator: kernels by the same names that NVRTC is asked for, callable through
// ctypes.
//
// INSTANTIATIONS names a generated file with one line EMULATE(Params, kernel<arguments>) per
// specialization.
#define CHUNKLLAMA_EMULATE
#include "../cuda/conformance.cuh"
#include "../cuda/copy_chunks.cuh"
#include "../cuda/draw_tokens.cuh"
#include "../cuda/rms_norm.cuh"
#include "../cuda/rope_append.cuh"
#include "../cuda/silu_and_mul.cuh"
#include "../cuda/tpp_merge.cuh"
#include "../cuda/tpp_partial.cuh"

struct EmulatedKernel {
  const char* name;
  size_t params_bytes;
  void (*run)(emulation::Dim3 grid, int threads, size_t shared_bytes, const void* params);
};

template <typename Params, void (*KERNEL_FUNCTION)(Params)>
void run(emulation::Dim3 grid, int threads, size_t shared_bytes, const void* params) {
  Params copy;
  memcpy(&copy, params, sizeof copy);
  emulation::launch(grid, threads, shared_bytes, [&copy] { KERNEL_FUNCTION(copy); });
}

#define EMULATE(PARAMS, ...) {#__VA_ARGS__, sizeof(PARAMS), run<PARAMS, __VA_ARGS__>},
static const EmulatedKernel kernels[] = {
#include INSTANTIATIONS
};

// 0, or -1 for a kernel this library does not hold, -2 for a parameter struct of another size.
extern "C" __attribute__((visibility("default"))) int emulate(
    const char* name, const unsigned* grid, int threads, size_t shared_bytes, const void* params,
    size_t params_bytes, int schedule, emulation::Counters* counters) {
  for (const EmulatedKernel& kernel : kernels) {
    if (strcmp(kernel.name, name)) continue;
    if (kernel.params_bytes != params_bytes) return -2;
    emulation::schedule = schedule;
    emulation::counters = *counters;
    kernel.run({grid[0], grid[1], grid[2]}, threads, shared_bytes, params);
    *counters = emulation::counters;
    return 0;
  }
  return -1;
}
