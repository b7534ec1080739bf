// Linear layers on packed weights. A unit is 32 output columns, one sequential stream:
//
//   bf16  [n / 32][k / 32][2][16 pairs of k][16 columns][2]     two AMX tiles of 1 KB per 32 k
//   int8  [n / 32][k / 32] of {[32] bf16 scales, [2][8 quads of k][16 columns][4]}:
//         u = round(w / scale) + 128, one scale per column and 32 k. Activations are not rounded
//         to 8 bits: that costs ten times as much accuracy.
//   fp32  [n / 32][k][32 columns]
#pragma once
#include "api.h"
#include "team.h"

namespace chunkllama {

constexpr int UNIT = 32;
constexpr int SCALES = 64;               // bytes of the scales before a k block of int8
constexpr int K_BLOCK[] = {16, 32, 32};  // k per block of a unit, by Type
constexpr int K_BYTES[] = {2048, 2048, SCALES + 1024};

#if defined(__AVX512BF16__)
constexpr Type NARROW_ACTIVATIONS = BF16;  // of models whose weights are bf16 or int8
#else
constexpr Type NARROW_ACTIVATIONS = F32;  // the vector units multiply floats
#endif
// What is done with x W^T + b: stored; added to y (float); with columns that alternate 16 of the
// gate and 16 of the up projection, stored as silu(gate) * up; or, BEST, not stored: only each
// row's largest column is kept.
enum Epilogue : int32_t { STORE, ADD, SILU_AND_MUL, BEST };

struct Best {
  float value;
  int32_t column;
};
// NaN beats every number, so that it is reported; of equal values the lower column.
inline bool beats(Best a, Best b) {
  if (b.value != b.value) return a.value != a.value && a.column < b.column;
  return !(a.value <= b.value) || (a.value == b.value && a.column < b.column);
}

// Rows of x must be readable up to the next multiple of 32.
struct LinearArgs {
  const Linear* linear;
  const void* x;
  int64_t x_stride;  // elements
  int32_t x_type;    // NARROW_ACTIVATIONS or float; float for fp32 weights
  void* y;
  int64_t y_stride;
  int32_t y_type;
  Epilogue epilogue;
  int64_t rows;
  Best* best = nullptr;  // BEST: [rows] of this thread, updated
  int64_t columns = 0;   // BEST: columns from here on are padding
};

// Rows of a panel, a phase of its own.
int64_t panel_rows(int64_t rows, int threads);

// Takes units until all are done; `panels` are phases, one for each panel of panel_rows(args.rows,
// threads).
void linear_units(const LinearArgs& args, Phase* panels, int thread, int threads);

// Packs rows of w [n, k] (F32 or BF16) into linear.type; rows beyond n and columns beyond k up to
// the padded sizes are zero.
void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Linear& packed,
                int64_t begin, int64_t end);

// Row `column` of the original weight, as floats: the embedding of a token whose table is the
// packed head (not int8).
void unpack_row(const Linear& packed, int64_t column, float* to, int64_t size);

}  // namespace chunkllama
