// The exported functions: each opens one parallel region and returns when its work is done.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "elementwise.h"
#include "layout.h"
#include "team.h"
#include "tiles.h"

using namespace chunkllama;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Non-zero if the operating system permits what this level needs: AMX tile state.
EXPORT int ck_initialize() {
#if defined(__AMX_TILE__)
  return tiles_permitted();
#else
  return 1;
#endif
}

// Size of a struct of this ABI, 0 for an unknown name: Python compares it with the size of its own.
EXPORT int64_t ck_struct_size(const char* name) {
#define SIZE(type) \
  { #type, sizeof(type) }
  static constexpr struct {
    const char* name;
    int64_t size;
  } sizes[] = {SIZE(Plan),   SIZE(Heads), SIZE(AttentionArgs), SIZE(RopeArgs), SIZE(NormArgs),
               SIZE(Weights), SIZE(Linear), SIZE(Layer), SIZE(Model),         SIZE(Step),
               SIZE(AdapterPart), SIZE(AdapterLinear), SIZE(AdapterRange), SIZE(StepAdapters),
               SIZE(RoundedChunk)};
#undef SIZE
  for (const auto& each : sizes)
    if (std::strcmp(each.name, name) == 0) return each.size;
  return 0;
}

// Elements of one chunk in one layer.
EXPORT int64_t ck_chunk_elements(const Heads* heads) {
  switch (heads->kv_type) {
    case BF16: return Layout<bf16>::chunk(heads->kv_heads, heads->head_dim);
    case INT8: return Layout<int8_t>::chunk(heads->kv_heads, heads->head_dim);
    default: return Layout<float>::chunk(heads->kv_heads, heads->head_dim);
  }
}

EXPORT void ck_attention(const AttentionArgs* args, int threads) {
  Phase units;
  parallel(threads, [&](int thread, int team) {
    attention_units(*args, units);
    const Range r = share(args->plan.num_rows * args->heads.q_heads, thread, team);
    merge_partials(*args, r.begin, r.end);
  });
}

EXPORT void ck_rope_append(const RopeArgs* args, int threads) {
  parallel(threads, [&](int thread, int team) {
    const Range r = share(args->plan.num_rows, thread, team);
    rope_append_rows(*args, append_boundary(*args, r.begin), append_boundary(*args, r.end));
  });
}

EXPORT void ck_rms_norm(const NormArgs* args, int64_t rows, int threads) {
  parallel(threads, [&](int thread, int team) {
    const Range r = share(rows, thread, team);
    rms_norm_rows(*args, r.begin, r.end);
  });
}

EXPORT void ck_silu_and_mul(const void* gate_up, void* y, int64_t rows, int64_t size, int32_t type,
                            int threads) {
  parallel(threads, [&](int thread, int team) {
    const Range r = share(rows, thread, team);
    silu_and_mul_rows(gate_up, y, size, type, r.begin, r.end);
  });
}

// triples [count, 3]: source, destination, tokens; in every layer, in order.
EXPORT void ck_copy_chunks(void* const* kv, int64_t layers, const Heads* heads,
                           const int32_t* triples, int64_t count, int threads) {
  parallel(threads, [&](int thread, int team) {
    const Range r = share(layers, thread, team);
    for (int64_t layer = r.begin; layer < r.end; layer++)
      for (const int32_t* t = triples; t < triples + 3 * count; t += 3)
        copy_chunk(kv[layer], *heads, t[0], t[1], t[2]);
  });
}
