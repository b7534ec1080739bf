// The C ABI, which chunkllama/backends/cpu/abi.py mirrors with ctypes: raw pointers and sizes, no
// ownership. Python compares the size of every struct with ck_struct_size when it loads a library.
#pragma once
#include <cstdint>

namespace chunkllama {

// F16 only as the type of given weights and of scales.
enum Type : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, F16 = 4 };

// A second 16-bit value for each column and 32 k of a quantized weight: nothing, an offset that is
// added to every weight, or the scale of the upper 16 k.
enum Extra : int32_t { NO_EXTRA = 0, OFFSETS = 1, UPPER_SCALES = 2 };

constexpr int CHUNK = 64;  // tokens per chunk

// Columns of an item and its flag, as chunkllama/attention/plan_format.py defines them.
enum ItemColumn {
  ROW_BEGIN,
  NUM_ROWS,
  CHUNK_OFFSET,
  NUM_TOKENS,
  FIRST_POSITION,
  PARTIAL_BASE,
  FLAGS,
  TILE_CLASS,
  ITEM_COLUMNS,
};
constexpr int32_t ITEM_MASK = 1, ITEM_WINDOW = 2;

struct Plan {
  const int32_t *items, *chunk_ids, *row_tail, *merge_indptr, *merge_slots, *row_flags;
  int64_t num_items, num_rows;
  int64_t window;  // keys that a row sees, its own included; 0: all before it
};

// Shape and types of one layer's attention; layout.h says where K and V lie.
struct Heads {
  int64_t q_heads, kv_heads, head_dim;
  int32_t kv_type;          // F32, BF16 or INT8
  int32_t activation_type;  // of q, k, v and the output
};

struct AttentionArgs {
  Plan plan;
  Heads heads;
  const int32_t* positions;          // [rows]
  const void* q;                     // [rows, q_stride], the first q_heads * head_dim of a row
  void* out;                         // [rows, out_stride]
  int64_t q_stride, out_stride;      // elements
  const void* kv;                    // one layer of the pool
  float *partial_out, *partial_lse;  // [slots, q_heads, head_dim], [slots, q_heads] (base 2)
  float scale;
  float tanh_scale;  // 0, or scores q k become tanh(q k * tanh_scale) before `scale` applies
  // Up to this many query rows per kv head run on the vector units, more on AMX.
  int32_t vector_rows;
  int32_t independent_rows;  // not 0: the rows of an item do not change each other's numbers
};

struct RopeArgs {
  Plan plan;
  Heads heads;
  const int32_t* positions;
  const float* cos_sin;  // [max_position, head_dim]
  const void* qkv;       // [rows, qkv_stride]
  void* q;               // [rows, q_stride]; may be qkv itself
  int64_t qkv_stride, q_stride;
  void* kv;
};

// A matrix [n, k] in packed order (linear.h); n is a multiple of 32, k of 64. The fields after
// `type` matter to quantized types.
struct Weights {
  const void* data;
  int64_t n;
  int32_t type;
  int32_t scale_type;  // BF16 or F16, of scales and offsets
  int32_t extra;
  float factor;         // INT4: the value of a code is table[code] * factor, a power of two that
  const float* table;   // keeps the 16 entries within [-1, 1]
  const int8_t* bytes;  // INT4: table * 128, or null: activations are not rounded to 8 bits
  // Quantized: with up to this many rows the codes are multiplied; with more the weights are
  // widened to bf16, where an instruction multiplies that, or to float. Below 0 they are widened
  // for any number of rows, which then does not change a row's numbers.
  int64_t few_rows;
};

// A linear layer: matrices above each other, which may be of different types (queries in 4 bits,
// values in 8). Unused parts have no columns.
constexpr int MAX_PARTS = 3;
struct Linear {
  Weights parts[MAX_PARTS];
  const float* bias;  // [n] or null
  int64_t n, k;       // n: of all parts
};

struct Layer {
  const float *attention_norm, *mlp_norm;  // [hidden_stride]
  Linear qkv, o, gate_up, down;
};

struct Model {
  const Layer* layers;
  int64_t num_layers;
  Heads heads;
  int64_t hidden;
  const float* final_norm;
  float eps, scale;
  int32_t vector_rows, independent_rows;  // as in AttentionArgs
  const void* embedding;  // [vocab, hidden] row by row, or null: rows are read from
  int32_t embedding_type;
  Weights packed_embedding;
  Linear head;
};

// A low-rank adapter of one linear layer: (x a) b is added to its output. Matrices are in blocks of
// 16 columns: a [ranks / 16][k][16], then [k][8] if 8 ranks are left, b [blocks][rank][16].
struct AdapterPart {
  const void* b;
  int64_t first, step, blocks;  // block i adds to columns [first + i * step, first + i * step + 16)
  int64_t offset, rank;         // of its columns of a
};
struct AdapterLinear {
  const void* a;
  int64_t ranks, k;  // ranks: of all parts, rounded up to 8; k is even
  AdapterPart parts[MAX_PARTS];
  int64_t num_parts;  // 0: the layer is not adapted
};

// Rows [begin, end) use an adapter: linears [num_layers][qkv, o, gate_up, down].
struct AdapterRange {
  int64_t begin, end;
  const AdapterLinear* linears;
};

// The adapters of a step.
struct StepAdapters {
  const AdapterRange* ranges;
  int64_t num_ranges;
  float* inner;  // [rows, inner_stride]: x a
  int64_t inner_stride;
  int32_t type;  // of all matrices, F32 or BF16
};

// One forward pass. Buffers have rows rounded up to 32, and strides of their width rounded up to
// 64, plus 32 elements (qkv: rounded up to 32); elements between a row's end and its stride are
// zero.
struct Step {
  Plan plan;
  const int32_t *token_ids, *positions;
  const float* cos_sin;
  void* const* kv;  // [num_layers]
  float *partial_out, *partial_lse;
  float* hidden;  // [rows, hidden_stride] residual stream; after the pass the normalised rows
  void *normed, *qkv, *attention, *mlp;
  StepAdapters adapters;
};

// A chunk in codes of 2 or 4 bits: K's and V's [layers, kv_heads, 64, head_dim], the first of a
// byte in its lowest bits; scales and zeros of K [layers, kv_heads, 64 / key_group, head_dim], of V
// [layers, kv_heads, 64]. head_dim is even.
struct RoundedChunk {
  const uint8_t *key_codes, *value_codes;
  const float *key_scales, *key_zeros, *value_scales, *value_zeros;
  void* out;  // [layers] chunks of layout.h
  int64_t layers, kv_heads, head_dim;
  int64_t key_group;  // tokens that share a scale, a multiple of 16
  int32_t bits;
  int32_t kv_type;  // of out: F32 or BF16
};

}  // namespace chunkllama
