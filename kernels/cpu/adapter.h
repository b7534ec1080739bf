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
  bool independent_rows;  // the rows of a block do not change each other's numbers
};

// Whether some range has an adapter of this layer.
bool is_adapted(const AdapterArgs& args);

// Fills rows [begin, end) of `inner`.
void fill_inner(const AdapterArgs& args, int64_t begin, int64_t end);

// Fills `inner` in units that the threads of a phase take; does not wait. Returns their number.
int64_t take_inner(const AdapterArgs& args, Phase& phase, int threads);

// Adds columns [column, column + columns) of x a b to y [end - begin, y_stride], for the rows
// [begin, end) that use an adapter. `inner` must be filled.
void add_outer(const AdapterArgs& args, int64_t begin, int64_t end, int64_t column,
               int64_t columns, float* y, int64_t y_stride);

}  // namespace chunkllama
