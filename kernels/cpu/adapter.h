// Low-rank adapters: what they add to the output of a linear layer, for the rows that use them.
#pragma once
#include "api.h"
#include "team.h"

namespace chunkllama {

struct AdapterArgs {
  const AdapterRange* ranges;
  int64_t num_ranges;
  int64_t linear;  // index into AdapterRange::linears
  int32_t type;    // of a and b, F32 or BF16
  const void* x;   // [rows, x_stride]
  int64_t x_stride;
  int32_t x_type;
  float* inner;  // [rows, inner_stride]: x a
  int64_t inner_stride;
  float* delta;  // [rows, delta_stride]: x a b, for the rows of the ranges alone
  int64_t delta_stride, columns;
  bool independent_rows;  // the rows of a block do not change each other's numbers
};

// Whether some range has an adapter of this layer.
bool is_adapted(const AdapterArgs& args);

// Fills `inner`, then `delta`; each is a phase that all threads run.
void adapter_units(const AdapterArgs& args, Phase* phases, int threads);

}  // namespace chunkllama
