// Linear layers on packed weights. A unit is 32 output columns, one sequential stream:
//
//   bf16  [n / 32][k / 32][2][16 pairs of k][16 columns][2]     two AMX tiles of 1 KB per 32 k
//   int8  [n / 32][k / 32] of {[32] scales, ([32] extra values,) [2][8 quads of k][16 columns][4]}:
//         weight = (byte - 128) * scale, one scale per column and 32 k. Activations are not rounded
//         to 8 bits: that costs ten times as much accuracy.
//   int4  [n / 32][k / 32] of {[32] scales, ([32] extra values,) [2][4][16 columns] words}: the
//         nth nibble of a word is the code of k = 8 * word + n, weight = value of the code * scale
//   fp32  [n / 32][k][32 columns]
#pragma once
#include "adapter.h"
#include "api.h"
#include "team.h"

namespace chunkllama {

constexpr int UNIT = 32;
constexpr int SCALES = 64;  // bytes of the scales (and of extra values) before a quantized k block
constexpr int K_BLOCK[] = {16, 32, 32, 32};          // k per block of a unit, by Type
constexpr int CODE_BYTES[] = {2048, 2048, 1024, 512};  // of a block without scales

inline bool is_quantized(const Weights& w) { return w.type == INT8 || w.type == INT4; }
// Bytes of a block before its codes, and of all of it.
inline int header_bytes(const Weights& w) {
  return !is_quantized(w) ? 0 : w.extra ? 2 * SCALES : SCALES;
}
inline int block_bytes(const Weights& w) { return header_bytes(w) + CODE_BYTES[w.type]; }

#if defined(BF16_PRODUCTS)
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
  const AdapterArgs* adapters = nullptr;  // what they add comes before the epilogue
};

// Rows of a panel, a phase of its own.
int64_t panel_rows(int64_t rows, int threads);

// Takes units until all are done; `panels` are phases, one for each panel of panel_rows(args.rows,
// threads).
void linear_units(const LinearArgs& args, Phase* panels, int thread, int threads);

// Packs units [begin, end) of `packed`, [packed.n, packed_k]: column first + i is row i of w [n, k]
// (F32, BF16 or F16). What lies beyond n and k is zero.
void pack_units(const void* w, int32_t w_type, int64_t n, int64_t k, const Weights& packed,
                int64_t packed_k, int64_t first, int64_t begin, int64_t end);

// The same from codes [n, k], a byte each, and 16-bit scales and extra values [n, ceil(k / 32)]
// (`extra` null without any), in the format of `packed`, INT8 or INT4.
struct Codes {
  const uint8_t* codes;
  const uint16_t *scales, *extra;
  int64_t n, k;
};
void pack_codes(const Codes& codes, const Weights& packed, int64_t packed_k, int64_t first,
                int64_t begin, int64_t end);

// Row `column` of the original weight, as floats: a token's embedding.
void unpack_row(const Weights& packed, int64_t packed_k, int64_t column, float* to, int64_t size);

}  // namespace chunkllama
