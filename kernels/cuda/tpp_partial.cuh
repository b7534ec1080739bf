// Two-phase partition attention (ChunkAttention, arXiv 2402.15220, section 3.2), both phases in one
// kernel.
//
// A work item is a contiguous range of rows times a run of KV chunks. Shared runs are items with
// many rows (the chunk-first phase), private runs are items with one row (sequence-first), causal
// rows are items with a mask by position. The query heads of one kv head ride along as extra rows
// ("packed rows"), so K/V are read once per group.
//
// Grid: any number of CTAs; CTA b walks the units b, b + gridDim.x, ... of its tile class. A unit =
// (item, kv head, row tile), row tile fastest, then kv head. Fewer CTAs than units make the launch
// persistent, more exit at once: the number of units is read from the plan on the device, so a
// captured launch follows a changing plan.
#pragma once
#include "plan_layout.cuh"
#include "softmax_state.cuh"

struct TppPartialParams {
  const void* q;         // [rows, Hq, D]
  const void* kv;        // [num_chunks, 2, Hkv, 64, D]; chunks stand chunk_stride elements apart
  void* out;             // [rows, Hq, D], written for rows with a single partial
  const int* positions;  // [rows]
  float scale_log2;      // softmax scale times log2(e), above 0
  float tanh_scale;      // 0, or scores become tanh(score * tanh_scale) first
  int num_kv_heads;
  int group;      // query heads per kv head
  int row_tiles;  // row tiles of the largest item: ceil(rows x group / ROWS)
  int tile_class;
  int window;  // keys that a row sees, its own included; 0: all before it
  int reserved;
  float* partial_out;  // [slots, Hq, D] normalised
  float* partial_lse;  // [slots, Hq] base 2, -inf = no visible key
  const int* header;   // the plan's arrays, see plan_format.py
  const int* items;
  const int* chunk_ids;
  const int* row_flags;
  i64 chunk_stride;
};
static_assert(sizeof(TppPartialParams) == 120, "chunkllama/backends/cuda/source.py, PARAMS");

// ROW_TILES m16 tiles per warp; ROW_WARPS warps side by side along rows, KEY_WARPS along the keys
// of a stage; STAGES stages of STAGE_TOKENS keys and values in shared memory. Only a BOUNDED tile
// knows windows and soft caps: others need not keep registers for them.
template <typename T_, int HEAD_DIM_, int ROW_TILES_, int ROW_WARPS_, int KEY_WARPS_,
          int STAGE_TOKENS_, int STAGES_, int MIN_CTAS_, bool BOUNDED_ = false>
struct Tile {
  using T = T_;
  static constexpr int HEAD_DIM = HEAD_DIM_, ROW_TILES = ROW_TILES_, ROW_WARPS = ROW_WARPS_,
                       KEY_WARPS = KEY_WARPS_;
  static constexpr int STAGE_TOKENS = STAGE_TOKENS_, STAGES = STAGES_, MIN_CTAS = MIN_CTAS_;
  static constexpr bool BOUNDED = BOUNDED_;
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS;
  static constexpr int THREADS = 32 * ROW_WARPS * KEY_WARPS;
  static constexpr int WARP_KEYS =
      STAGE_TOKENS / KEY_WARPS;  // keys of a stage that one warp scores
  static constexpr int KEY_TILES = WARP_KEYS / 8;
  static constexpr int ROW_BYTES = HEAD_DIM * 2;
  static constexpr int PIECES = HEAD_DIM / 8;  // 16-byte pieces of a row
  static constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
  static constexpr int MATRIX_BYTES = STAGE_TOKENS * HEAD_DIM * 2;  // K or V of one stage
  static constexpr int STAGE_BYTES = 2 * MATRIX_BYTES;
  static constexpr int PIPELINE_BYTES = Q_BYTES + STAGES * STAGE_BYTES;
  // Joining the key warps reuses the pipeline's memory; the padding makes the float2 stores free of
  // bank conflicts.
  static constexpr int JOIN_STRIDE = HEAD_DIM + 8;
  static constexpr int JOIN_BYTES = KEY_WARPS * ROWS * (JOIN_STRIDE + 2) * 4;
  static constexpr int SHARED_BYTES = PIPELINE_BYTES > JOIN_BYTES ? PIPELINE_BYTES : JOIN_BYTES;
  // Q fragments stay in registers where these suffice, else they are read again for every stage.
  static constexpr bool Q_IN_REGISTERS = ROW_TILES * HEAD_DIM <= 128;
  static_assert(STAGE_TOKENS * PIECES % THREADS == 0,
                "every thread copies as many pieces of a stage");
  static_assert(WARP_KEYS % 16 == 0 && CHUNK % STAGE_TOKENS == 0 && HEAD_DIM % 32 == 0 &&
                    STAGES >= 2,
                "tile shape");
};

// Which pieces of a row change places: piece p of row r lives at p ^ swizzle(r), so that eight rows
// of one piece column meet all 32 banks once, which is what ldmatrix reads. Rows of 8 k pieces need
// the row's low three bits; rows of 12 (head_dim 96) advance four banks groups per row by
// themselves and need the next two. Rows eight apart have the same swizzle.
template <class X>
DEVICE int swizzle(int row) {
  return X::PIECES % 8 == 0 ? row & 7 : (row >> 1) & 3;
}
template <class X>
DEVICE u32 swizzled(int row, int piece) {
  return row * X::ROW_BYTES + (piece ^ swizzle<X>(row)) * 16;
}
// The address `pieces` further along a row, from an address in the row's first pieces. What the
// swizzle can change of an address is zero in that of a row, so that a lane computes one address
// and reaches every other by an XOR and an addition of constants. `pieces` shares no bit with the
// piece that the address began with.
template <class X>
DEVICE u32 along_row(u32 address, int pieces) {
  constexpr int SWIZZLED = X::PIECES % 8 == 0 ? 7 : 3;
  return (address ^ ((pieces & SWIZZLED) * 16)) + (pieces & ~SWIZZLED) * 16;
}

struct ThreadPiece {
  int row, piece;
};

// The n-th 16-byte piece that this thread copies of a matrix with HEAD_DIM columns. Where the CTA
// covers whole rows, a thread keeps its piece column and its row's low bits, so that its addresses
// differ by constants.
template <class X>
DEVICE ThreadPiece thread_piece(int n) {
  const int thread = threadIdx.x;
  if (X::THREADS % X::PIECES == 0)
    return {thread / X::PIECES + n * (X::THREADS / X::PIECES), thread % X::PIECES};
  return {(thread + n * X::THREADS) / X::PIECES, (thread + n * X::THREADS) % X::PIECES};
}

struct WarpRole {
  int row_warp, key_warp, lane;
  int group,
      pair;  // of an mma fragment: rows `group` and `group + 8`, columns 2 pair and 2 pair + 1
};

template <class X>
DEVICE WarpRole warp_role() {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  return {warp % X::ROW_WARPS, warp / X::ROW_WARPS, lane, lane >> 2, lane & 3};
}

struct Unit {
  int row_begin;     // first row of the item
  int packed_begin;  // this tile's first packed row, counted from the item's first
  int packed_rows;   // valid packed rows of this tile
  int kv_head;
  int num_tokens;       // keys to walk
  int unmasked_tokens;  // keys below this one are visible to every row of the tile
  int first_position;
  int partial_base;
  bool masked, windowed;
  const int* chunk_ids;
  u32 group_inverse;  // 2^32 / group, rounded up

  // Packed row r's row, counted from the item's first, by a multiplication: a division by the group
  // would cost more than the rest of a copy. Exact for packed rows below 2^32 / group.
  DEVICE int item_row(const TppPartialParams& p, int r) const {
    const u32 packed = packed_begin + r;
    return p.group == 1 ? packed : (u32)((u64)packed * group_inverse >> 32);
  }
  DEVICE int row(const TppPartialParams& p, int r) const { return row_begin + item_row(p, r); }
  DEVICE int head(const TppPartialParams& p, int r) const {
    return kv_head * p.group + packed_begin + r - item_row(p, r) * p.group;
  }
  // How many keys of the run a row sees.
  DEVICE int visible_tokens(const TppPartialParams& p, int row) const {
    if (!masked) return num_tokens;
    const int visible = p.positions[row] + 1 - first_position;
    return visible < num_tokens ? visible : num_tokens;
  }
  // Where a row's keys end, counted from the run's first; of an item with windows this may lie
  // beyond the run's end, as a window is counted back from it.
  DEVICE int end_of_keys(const TppPartialParams& p, int row) const {
    return windowed ? p.positions[row] + 1 - first_position : visible_tokens(p, row);
  }
};

template <class X>
DEVICE Unit decode_unit(const TppPartialParams& p, int index) {
  const int row_tile = index % p.row_tiles, rest = index / p.row_tiles;
  const int first_item = p.tile_class == 0 ? 0 : p.header[NUM_CLASS0_ITEMS];
  const int* item = p.items + (i64)(first_item + rest / p.num_kv_heads) * ITEM_COLUMNS;
  Unit unit;
  unit.group_inverse = 0xffffffffu / p.group + 1;
  unit.row_begin = item[ROW_BEGIN];
  unit.packed_begin = row_tile * X::ROWS;
  unit.packed_rows = item[ITEM_ROWS] * p.group - unit.packed_begin;
  unit.packed_rows = unit.packed_rows < X::ROWS ? unit.packed_rows : X::ROWS;
  unit.kv_head = rest % p.num_kv_heads;
  unit.num_tokens = item[NUM_TOKENS];
  unit.first_position = item[FIRST_POSITION];
  unit.partial_base = item[PARTIAL_BASE];
  unit.masked = (item[FLAGS] & ITEM_MASK) != 0;
  unit.windowed = X::BOUNDED && (item[FLAGS] & ITEM_WINDOW) != 0;
  unit.chunk_ids = p.chunk_ids + item[CHUNK_OFFSET];
  if (unit.packed_rows > 0) {  // positions never decrease over a masked item's rows: the tile's
                               // last row bounds the run
    unit.num_tokens = unit.visible_tokens(p, unit.row(p, unit.packed_rows - 1));
    unit.num_tokens = unit.num_tokens > 0 ? unit.num_tokens : 0;
    unit.unmasked_tokens = unit.windowed ? 0 : unit.visible_tokens(p, unit.row(p, 0));
  }
  return unit;
}

// Feeds the stages: every load() issues one stage of K and V and closes one copy group, also past
// the end of the run, so that "all but the newest STAGES - 2 groups" always means the stage about
// to be read.
template <class X>
struct StageLoader {
  const unsigned char* kv_head;  // this thread's first piece of K of this kv head in chunk 0
  u32 value_offset;              // bytes from K to V
  i64 chunk_bytes;
  const int* chunk_ids;
  int num_tokens;
  u32 stages;                // address of the first stage
  int token = 0, stage = 0;  // next to load
  int chunk;                 // its chunk id, read one load ahead so that no copy waits for it

  DEVICE StageLoader(const TppPartialParams& p, const Unit& unit, u32 stages)
      : kv_head((const unsigned char*)p.kv + (i64)unit.kv_head * CHUNK * X::ROW_BYTES +
                threadIdx.x * 16),
        value_offset(p.num_kv_heads * CHUNK * X::ROW_BYTES),
        chunk_bytes(p.chunk_stride * 2),
        chunk_ids(unit.chunk_ids),
        num_tokens(unit.num_tokens),
        stages(stages),
        chunk(unit.num_tokens > 0 ? unit.chunk_ids[0] : 0) {}

  DEVICE void load() {
    if (token < num_tokens) {
      const unsigned char* keys = kv_head + chunk * chunk_bytes + (u32)token % CHUNK * X::ROW_BYTES;
      const u32 destination = stages + stage * X::STAGE_BYTES;
      if (token + X::STAGE_TOKENS <= num_tokens) copy_stage<true>(destination, keys);
      else copy_stage<false>(destination, keys);
      token += X::STAGE_TOKENS;
      stage = stage + 1 == X::STAGES ? 0 : stage + 1;
      if (token < num_tokens) chunk = chunk_ids[(u32)token / CHUNK];
    }
    copy_async_commit();
  }

  // A matrix lies in memory in the order in which threads count its pieces. In shared memory, a
  // thread's pieces are a constant apart where a CTA covers rows of whole swizzles at a time.
  template <bool FULL>
  DEVICE void copy_stage(u32 destination, const unsigned char* keys) {
    constexpr int ROWS = X::THREADS / X::PIECES;
    constexpr bool CONSTANT = X::THREADS % X::PIECES == 0 && ROWS % 8 == 0;
    const unsigned char* values = keys + value_offset;
    const ThreadPiece first = thread_piece<X>(0);
#pragma unroll
    for (int n = 0; n < X::STAGE_TOKENS * X::PIECES / X::THREADS; n++) {
      const ThreadPiece at = thread_piece<X>(n);
      const u32 to =
          destination + (CONSTANT ? swizzled<X>(first.row, first.piece) + n * ROWS * X::ROW_BYTES
                                  : swizzled<X>(at.row, at.piece));
      const bool valid = FULL || token + at.row < num_tokens;
      copy_async16<FULL>(to, keys + n * X::THREADS * 16, valid);
      copy_async16<FULL>(to + X::MATRIX_BYTES, values + n * X::THREADS * 16, valid);
    }
  }
};

template <class X>
DEVICE void load_queries(const TppPartialParams& p, const Unit& unit, u32 queries) {
#pragma unroll 2
  for (int n = 0; n < (X::ROWS * X::PIECES + X::THREADS - 1) / X::THREADS; n++) {
    const ThreadPiece at = thread_piece<X>(n);
    if (X::ROWS * X::PIECES % X::THREADS != 0 && at.row >= X::ROWS) break;
    const bool valid = at.row < unit.packed_rows;
    const int packed = valid ? at.row : 0;
    const i64 from = (i64)unit.row(p, packed) * (p.num_kv_heads * p.group) + unit.head(p, packed);
    copy_async16<false>(queries + swizzled<X>(at.row, at.piece),
                        (const typename X::T*)p.q + from * X::HEAD_DIM + at.piece * 8, valid);
  }
}

template <class X>
DEVICE void read_query_fragment(u32 (&fragment)[4], u32 queries, int tile, int step) {
  ldmatrix_x4<false>(fragment, along_row<X>(queries, 2 * step) + tile * 16 * X::ROW_BYTES);
}

template <class X>
struct Queries {
  u32 fragments[X::Q_IN_REGISTERS ? X::ROW_TILES : 1][X::Q_IN_REGISTERS ? X::HEAD_DIM / 16 : 1][4];

  DEVICE void keep(u32 queries) {
    if (!X::Q_IN_REGISTERS) return;
#pragma unroll
    for (int a = 0; a < (X::Q_IN_REGISTERS ? X::ROW_TILES : 1); a++)
#pragma unroll
      for (int k = 0; k < (X::Q_IN_REGISTERS ? X::HEAD_DIM / 16 : 1); k++)
        read_query_fragment<X>(fragments[a][k], queries, a, k);
  }

  DEVICE void get(u32 (&fragment)[4], u32 queries, int tile, int step) const {
    if (X::Q_IN_REGISTERS) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        fragment[e] = fragments[X::Q_IN_REGISTERS ? tile : 0][X::Q_IN_REGISTERS ? step : 0][e];
    } else {
      read_query_fragment<X>(fragment, queries, tile, step);
    }
  }
};

template <class X>
using Scores = float[X::ROW_TILES][X::KEY_TILES][4];
template <class X>
using Output = float[X::ROW_TILES][X::HEAD_DIM / 8][4];
template <class X>
using References = float[X::ROW_TILES][2];
// Sums of weights as mma accumulators: the weights times a matrix of ones. A row's sum is that of
// the weights as they are rounded, so what rounding does to a dominant weight cancels in the
// quotient. All columns are alike; of a lane's two only the first is rescaled and read.
template <class X>
using Sums = float[X::ROW_TILES][4];

// The addresses that a lane reads fragments from: its rows of the queries, and of the first keys
// and values of its warp in a stage.
struct LaneAddresses {
  u32 queries, keys, values;
};

template <class X>
DEVICE LaneAddresses lane_addresses(u32 shared, WarpRole role) {
  const int lane = role.lane, key = role.key_warp * X::WARP_KEYS;
  const u32 first = shared + X::Q_BYTES;
  return {
      shared + swizzled<X>(role.row_warp * X::ROW_TILES * 16 + (lane & 15), lane >> 4),
      kept(first + swizzled<X>(key + (lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1)),
      kept(first + X::MATRIX_BYTES + swizzled<X>(key + (lane & 15), lane >> 4)),
  };
}

// S = Q K^T over this warp's keys. Rows of K are keys: plain ldmatrix yields the column-major
// operand.
template <class X>
DEVICE void score(Scores<X>& s, const Queries<X>& q, u32 queries, u32 keys) {
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int j = 0; j < X::KEY_TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[a][j][e] = 0.f;
#pragma unroll
  for (int k = 0; k < X::HEAD_DIM / 16; k++) {
    u32 rows[X::ROW_TILES][4];
#pragma unroll
    for (int a = 0; a < X::ROW_TILES; a++) q.get(rows[a], queries, a, k);
#pragma unroll
    for (int j = 0; j < X::KEY_TILES; j += 2) {
      u32 columns[4];
      ldmatrix_x4<false>(columns, along_row<X>(keys, 2 * k) + j * 8 * X::ROW_BYTES);
#pragma unroll
      for (int a = 0; a < X::ROW_TILES; a++) {
        Element<typename X::T>::mma(s[a][j], rows[a], columns[0], columns[1]);
        Element<typename X::T>::mma(s[a][j + 1], rows[a], columns[2], columns[3]);
      }
    }
  }
}

// Hides a key unless it is one of the last `window` before the end of the row's keys. A negative
// distance is a large unsigned one.
template <class X>
DEVICE void mask_scores(Scores<X>& s, const int (&visible)[X::ROW_TILES][2], int first_token,
                        int window, WarpRole role) {
  const int first_key = first_token + role.key_warp * X::WARP_KEYS + 2 * role.pair;
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int j = 0; j < X::KEY_TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = first_key + j * 8 + (e & 1), end = visible[a][e >> 1];
        const bool hidden = X::BOUNDED ? (u32)(end - 1 - key) >= (u32)window : key >= end;
        if (hidden) s[a][j][e] = NEGATIVE_INFINITY;
      }
}

// Scores become tanh(score * tanh_scale) = 1 - 2 / (e^(2 score tanh_scale) + 1); the absolute error
// of 1e-6 is far below what 16-bit outputs show.
template <class X>
DEVICE void cap_scores(Scores<X>& s, float tanh_scale) {
  const float exponent = tanh_scale * 2.f * 1.4426950408889634f;
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int j = 0; j < X::KEY_TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[a][j][e] = 1.f - exp2_fast(1.f - log2_fast(exp2_fast(s[a][j][e] * exponent) + 1.f));
}

// Scores become weights 2^(score - reference). The reference of a row is a maximum of before: what
// was accumulated is scaled down only when a row of the warp exceeds it by 2^8, which leaves
// weights far from overflow.
template <class X>
DEVICE void softmax(Scores<X>& s, References<X>& references, Output<X>& o, Sums<X>& sums,
                    float scale_log2) {
  constexpr float SLACK = 8.f;
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float largest = NEGATIVE_INFINITY;
#pragma unroll
      for (int j = 0; j < X::KEY_TILES; j++) {
        largest = fmaxf(largest, s[a][j][2 * h]);
        largest = fmaxf(largest, s[a][j][2 * h + 1]);
      }
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      if (any_lane(largest * scale_log2 > references[a][h] + SLACK)) {
        SoftmaxState state = {references[a][h], sums[a][2 * h]};
        const float factor = state.raise(largest * scale_log2);
        references[a][h] = state.maximum;
        sums[a][2 * h] = state.sum;
#pragma unroll
        for (int j = 0; j < X::HEAD_DIM / 8; j++) {
          o[a][j][2 * h] *= factor;
          o[a][j][2 * h + 1] *= factor;
        }
      }
      const float anchor = SoftmaxState{references[a][h], 0.f}.anchor();
#pragma unroll
      for (int j = 0; j < X::KEY_TILES; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[a][j][2 * h + e] = exp2_fast(s[a][j][2 * h + e] * scale_log2 - anchor);
    }
}

// O += P V. The weights' C fragments are the A operand as they stand; rows of V are keys:
// transposed ldmatrix.
template <class X>
DEVICE void accumulate(Output<X>& o, Sums<X>& sums, const Scores<X>& s, u32 values) {
#pragma unroll
  for (int k = 0; k < X::KEY_TILES / 2; k++) {
    u32 weights[X::ROW_TILES][4];
#pragma unroll
    for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float* pair = &s[a][2 * k + e / 2][2 * (e & 1)];
        weights[a][e] = Element<typename X::T>::pack2(pair[0], pair[1]);
      }
    constexpr u32 ONES = Element<typename X::T>::ONES;
#pragma unroll
    for (int a = 0; a < X::ROW_TILES; a++)
      Element<typename X::T>::mma(sums[a], weights[a], ONES, ONES);
#pragma unroll
    for (int j = 0; j < X::HEAD_DIM / 8; j += 2) {
      u32 columns[4];
      ldmatrix_x4<true>(columns, along_row<X>(values, j) + k * 16 * X::ROW_BYTES);
#pragma unroll
      for (int a = 0; a < X::ROW_TILES; a++) {
        Element<typename X::T>::mma(o[a][j], weights[a], columns[0], columns[1]);
        Element<typename X::T>::mma(o[a][j + 1], weights[a], columns[2], columns[3]);
      }
    }
  }
}

// Puts this warp's share of (O, state) where the key warps meet.
template <class X>
DEVICE void stage_output(const Output<X>& o, const References<X>& references, const Sums<X>& sums,
                         float* outputs, SoftmaxState* joined, WarpRole role) {
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at =
          role.key_warp * X::ROWS + (role.row_warp * X::ROW_TILES + a) * 16 + role.group + 8 * h;
      if (role.pair == 0) joined[at] = {references[a][h], sums[a][2 * h]};
#pragma unroll
      for (int j = 0; j < X::HEAD_DIM / 8; j++)
        *(float2*)(outputs + at * X::JOIN_STRIDE + j * 8 + 2 * role.pair) =
            make_float2(o[a][j][2 * h], o[a][j][2 * h + 1]);
    }
}

// Joins the key warps' shares of every row and writes the row's partial, or its output if there is
// no other partial.
template <class X>
DEVICE void write_rows(const TppPartialParams& p, const Unit& unit, const float* outputs,
                       const SoftmaxState* joined) {
  for (int i = threadIdx.x; i < unit.packed_rows * (X::HEAD_DIM / 4); i += X::THREADS) {
    const int r = i / (X::HEAD_DIM / 4), column = i % (X::HEAD_DIM / 4) * 4;
    SoftmaxState state = SoftmaxState::empty();
#pragma unroll
    for (int w = 0; w < X::KEY_WARPS; w++) state.raise(joined[w * X::ROWS + r].maximum);
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < X::KEY_WARPS; w++) {
      const SoftmaxState other = joined[w * X::ROWS + r];
      const float weight = state.weight_of(other);
      const float4 share = *(const float4*)(outputs + (w * X::ROWS + r) * X::JOIN_STRIDE + column);
      state.sum += weight * other.sum;
      sums[0] += weight * share.x;
      sums[1] += weight * share.y;
      sums[2] += weight * share.z;
      sums[3] += weight * share.w;
    }
    const float inverse = state.inverse_sum();
    const int row = unit.row(p, r), head = unit.head(p, r), num_heads = p.num_kv_heads * p.group;
    if (p.row_flags[row]) {
      uint2 packed;
      packed.x = Element<typename X::T>::pack2(sums[0] * inverse, sums[1] * inverse);
      packed.y = Element<typename X::T>::pack2(sums[2] * inverse, sums[3] * inverse);
      *(uint2*)((typename X::T*)p.out + ((i64)row * num_heads + head) * X::HEAD_DIM + column) =
          packed;
    } else {
      const i64 at = (i64)(unit.partial_base + row - unit.row_begin) * num_heads + head;
      *(float4*)(p.partial_out + at * X::HEAD_DIM + column) =
          make_float4(sums[0] * inverse, sums[1] * inverse, sums[2] * inverse, sums[3] * inverse);
      if (column == 0) p.partial_lse[at] = state.log_sum();
    }
  }
}

template <class X>
DEVICE void attend(const TppPartialParams& p, const Unit& unit, unsigned char* shared) {
  const WarpRole role = warp_role<X>();
  const u32 base = shared_address(shared);
  StageLoader<X> loader(p, unit, base + X::Q_BYTES);
  load_queries<X>(p, unit, base);
#pragma unroll
  for (int i = 0; i < X::STAGES - 1; i++) loader.load();

  Output<X> o;
  Sums<X> sums;
  References<X> references;
  int visible[X::ROW_TILES][2];
#pragma unroll
  for (int a = 0; a < X::ROW_TILES; a++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = (role.row_warp * X::ROW_TILES + a) * 16 + role.group + 8 * h;
      visible[a][h] = r < unit.packed_rows ? unit.end_of_keys(p, unit.row(p, r)) : unit.num_tokens;
      references[a][h] = NEGATIVE_INFINITY;
      sums[a][2 * h] = sums[a][2 * h + 1] = 0.f;
#pragma unroll
      for (int j = 0; j < X::HEAD_DIM / 8; j++) o[a][j][2 * h] = o[a][j][2 * h + 1] = 0.f;
    }

  Queries<X> q;
  const LaneAddresses addresses = lane_addresses<X>(base, role);
  u32 stage = 0;  // bytes from the first one
  for (int token = 0; token < unit.num_tokens; token += X::STAGE_TOKENS) {
    copy_async_wait<X::STAGES - 2>();
    __syncthreads();  // this stage has arrived for all, and none reads the one loaded next
    loader.load();
    if (token == 0) q.keep(addresses.queries);
    Scores<X> s;
    score<X>(s, q, addresses.queries, addresses.keys + stage);
    if (X::BOUNDED && p.tanh_scale != 0.f) cap_scores<X>(s, p.tanh_scale);
    if (token + X::STAGE_TOKENS > unit.unmasked_tokens)
      mask_scores<X>(s, visible, token, p.window > 0 ? p.window : 0x7fffffff, role);
    softmax<X>(s, references, o, sums, p.scale_log2);
    accumulate<X>(o, sums, s, addresses.values + stage);
    stage = stage + X::STAGE_BYTES == X::STAGES * X::STAGE_BYTES ? 0 : stage + X::STAGE_BYTES;
  }
  copy_async_wait<0>();
  __syncthreads();  // the pipeline's memory becomes the join buffer

  float* outputs = (float*)shared;
  SoftmaxState* joined = (SoftmaxState*)(outputs + X::KEY_WARPS * X::ROWS * X::JOIN_STRIDE);
  stage_output<X>(o, references, sums, outputs, joined, role);
  __syncthreads();  // every warp's share is in place
  write_rows<X>(p, unit, outputs, joined);
}

template <class X>
KERNEL(X::THREADS, X::MIN_CTAS)
tpp_partial(TppPartialParams p) {
  DYNAMIC_SHARED(shared);
  const int class0 = p.header[NUM_CLASS0_ITEMS];
  const int num_items = p.tile_class == 0 ? class0 : p.header[NUM_ITEMS] - class0;
  const int num_units = num_items * p.num_kv_heads * p.row_tiles;
  for (int index = blockIdx.x; index < num_units; index += gridDim.x) {
    const Unit unit = decode_unit<X>(p, index);
    if (unit.packed_rows <= 0) continue;
    attend<X>(p, unit, shared);
    __syncthreads();  // the next unit's queries overwrite the join buffer
  }
}
