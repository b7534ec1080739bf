#include "elementwise.h"

#include <cmath>
#include <limits>

#include "layout.h"
#include "vec.h"

namespace chunkllama {
namespace {

// Calls f(null pointer of the type): run-time type to template argument.
template <class F>
void with_type(int32_t type, F&& f) {
  if (type == BF16) f(static_cast<bf16*>(nullptr));
  else f(static_cast<float*>(nullptr));
}
template <class F>
void with_kv_type(int32_t type, F&& f) {
  if (type == INT8) f(static_cast<int8_t*>(nullptr));
  else with_type(type, f);
}
template <class P>
using Pointee = std::remove_pointer_t<P>;

INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { *p = to_bf16(x); }

// Applies f to whole vectors, then to single elements.
template <class F>
INLINE void each(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, std::integral_constant<int, W>{});
  for (; i < size; i++) f(i, std::integral_constant<int, 1>{});
}
template <int N, class T>
INLINE auto get(const T* p) {
  if constexpr (N == 1) return to_float(*p);
  else return load(p);
}
template <int N, class T, class V>
INLINE void set_at(T* p, V v) {
  if constexpr (N == 1) put(p, v);
  else store(p, v);
}

template <class X, class Y>
void norm_row(const NormArgs& a, const X* x, const X* residual, X* sum_out, Y* y) {
  Vec squares{};
  float rest = 0;
  each(a.hidden, [&](int64_t i, auto n) {
    constexpr int N = decltype(n)::value;
    auto v = get<N>(x + i);
    if (residual) {
      v += get<N>(residual + i);
      set_at<N>(sum_out + i, v);
      v = get<N>(sum_out + i);
    }
    if constexpr (N == 1) rest += v * v;
    else squares += v * v;
  });
  const X* from = residual ? sum_out : x;
  const float factor = 1.f / std::sqrt((sum(squares) + rest) / a.hidden + a.eps);
  each(a.hidden, [&](int64_t i, auto n) {
    constexpr int N = decltype(n)::value;
    set_at<N>(y + i, get<N>(from + i) * factor * get<N>(a.weight + i));
  });
}

// Rotates one head; `to` may be `from`.
template <class X, class Y>
INLINE void rotate(const X* from, Y* to, const float* cos, const float* sin, int64_t half) {
  each(half, [&](int64_t i, auto n) {
    constexpr int N = decltype(n)::value;
    const auto a = get<N>(from + i), b = get<N>(from + half + i), c = get<N>(cos + i),
               s = get<N>(sin + i);
    set_at<N>(to + i, a * c - b * s);
    set_at<N>(to + half + i, b * c + a * s);
  });
}

// k is one head of one token, in the pool's type with zeros up to k_dim: a column of the chunk's K.
template <class KV>
INLINE void append_k(KV* k_chunk, int offset, const KV* k, long dim) {
  using L = Layout<KV>;
  constexpr int AT_ONCE = L::PAIRS ? 2 : 1;
  KV* to = k_chunk + offset / BLOCK * L::k_block(dim) + offset % BLOCK * AT_ONCE;
  for (long d = 0; d < L::k_dim(dim); d += AT_ONCE, to += L::k_step())
    memcpy(to, k + d, AT_ONCE * sizeof(KV));
}
// v is one head of one token, in the pool's type.
INLINE void append_v(bf16* v_chunk, int offset, const bf16* v, long dim) {
  bf16* to = v_chunk + offset / 2 * Layout<bf16>::v_step(dim);
  for (long d = 0; d < dim; d += W, to += 2 * W) {
    const IntVec odd_half = (IntVec)load(v + d);
    const IntVec pairs =
        offset % 2 ? (load_pairs(to) & 0xffff) | odd_half : odd_half >> 16 & 0xffff;
    memcpy(to, &pairs, sizeof pairs);
  }
}
template <class KV>  // float or codes
INLINE void append_v(KV* v_chunk, int offset, const KV* v, long dim) {
  memcpy(v_chunk + offset * Layout<KV>::v_step(dim), v, dim * sizeof(KV));
}

// signs[i][j] of a Hadamard matrix of 16.
struct Signs {
  alignas(64) float values[16][16];
  constexpr Signs() : values() {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) values[i][j] = __builtin_popcount(i & j) % 2 ? -1.f : 1.f;
  }
};
constexpr Signs SIGNS;

// Multiplies blocks of x [dim], as long as the largest power of two that divides dim, by an
// orthonormal Hadamard matrix: dimensions that are large in every key spread over the block, and
// products of queries and keys stay what they are (QuaRot, arXiv 2404.00456, section 4.2).
INLINE void mix(float* x, long dim) {
  const long block = dim & -dim;
  const float factor = 1.f / std::sqrt(float(block));
  for (float* at = x; at < x + dim; at += 16) {
    Vec sums[16 / W] = {};
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16 / W; j++) sums[j] += set(at[i]) * load(SIGNS.values[i] + j * W);
    for (int j = 0; j < 16 / W; j++) store(at + j * W, sums[j] * factor);
  }
  for (long half = 16; half < block; half *= 2)
    for (long begin = 0; begin < dim; begin += 2 * half)
      for (float *a = x + begin, *b = a + half; a < x + begin + half; a += W, b += W) {
        const Vec low = load(a), high = load(b);
        store(a, low + high);
        store(b, low - high);
      }
}

// x [dim] -> codes; returns the scale as it is stored. Values that are not all finite have a scale
// of NaN, values too small for one count as zero.
INLINE bf16 quantize(const float* x, long dim, int8_t* codes) {
  Vec top{};
  IntVec broken{};
  for (long d = 0; d < dim; d += W) {
    const Vec v = load(x + d);
    broken |= ~(v - v == 0.f);
    top = max(max(v, -v), top);
  }
  const bool is_broken = any(broken);
  const bf16 rounded = to_bf16(largest(top) / 127.f);
  const float scale = to_float(rounded);
  const bool is_tiny = !(scale >= std::numeric_limits<float>::min());
  const Vec factor = set(is_tiny ? 0.f : 1.f / scale), magic = set(12582912.f);  // 1.5 * 2^23
  for (long d = 0; d < dim; d += W) {
    const IntVec q = is_broken ? IntVec{} : (IntVec)(load(x + d) * factor + magic) - (IntVec)magic;
    const ByteVec narrow = __builtin_convertvector(q, ByteVec);
    memcpy(codes + d, &narrow, sizeof narrow);
  }
  if (is_broken) return to_bf16(NAN);
  return is_tiny ? 0 : rounded;
}

// Writes k (overwritten) and v, one head of one token, into their chunk.
template <class X>
INLINE void append(const RopeArgs& a, int8_t* chunk, long head, int offset, float* k, const X* v) {
  using L = Layout<int8_t>;
  const long dim = a.heads.head_dim, heads = a.heads.kv_heads;
  alignas(64) int8_t codes[256];
  alignas(64) float value[256];
  bf16* scales = reinterpret_cast<bf16*>(chunk + L::scale_offset(head, heads, dim)) + offset;
  mix(k, dim);
  scales[0] = quantize(k, dim, codes);
  append_k(chunk + L::k_offset(head, dim), offset, codes, dim);
  for (long d = 0; d < dim; d += W) store(value + d, load(v + d));
  scales[CHUNK] = quantize(value, dim, codes);
  append_v(chunk + L::v_offset(head, heads, dim), offset, codes, dim);
}
template <class X, class KV>
INLINE void append(const RopeArgs& a, KV* chunk, long head, int offset, KV* k, const X* v) {
  using L = Layout<KV>;
  const long dim = a.heads.head_dim, heads = a.heads.kv_heads;
  alignas(64) KV value[256];
  append_k(chunk + L::k_offset(head, dim), offset, k, dim);
  for (long d = 0; d < dim; d += W) store(value + d, load(v + d));
  append_v(chunk + L::v_offset(head, heads, dim), offset, value, dim);
}

template <class X, class KV>
void rope_append_row(const RopeArgs& a, int64_t row) {
  using L = Layout<KV>;
  const long dim = a.heads.head_dim, heads = a.heads.kv_heads;
  const int32_t position = a.positions[row];
  const float *cos = a.cos_sin + position * dim, *sin = cos + dim / 2;
  const X* x = static_cast<const X*>(a.qkv) + row * a.qkv_stride;
  X* q = static_cast<X*>(a.q) + row * a.q_stride;
  for (int64_t h = 0; h < a.heads.q_heads; h++) {
    if constexpr (L::SCALED) {
      alignas(64) float mixed[256];
      rotate(x + h * dim, mixed, cos, sin, dim / 2);
      mix(mixed, dim);
      for (long d = 0; d < dim; d += W) store(q + h * dim + d, load(mixed + d));
    } else {
      rotate(x + h * dim, q + h * dim, cos, sin, dim / 2);
    }
  }
  const int32_t* tail = a.plan.row_tail + row * 2;
  const int at = position - tail[1], offset = at % CHUNK;
  KV* chunk =
      static_cast<KV*>(a.kv) + a.plan.chunk_ids[tail[0] + at / CHUNK] * L::chunk(heads, dim);
  const X *k = x + a.heads.q_heads * dim, *v = k + heads * dim;
  alignas(64) std::conditional_t<L::SCALED, float, KV> rotated[256] = {};
  for (long h = 0; h < heads; h++) {
    rotate(k + h * dim, rotated, cos, sin, dim / 2);
    append(a, chunk, h, offset, rotated, v + h * dim);
  }
}

template <class KV>
void copy_tokens(KV* kv, const Heads& heads, int64_t source, int64_t destination, int64_t tokens) {
  using L = Layout<KV>;
  const long dim = heads.head_dim, n = L::chunk(heads.kv_heads, dim);
  const KV* from = kv + source * n;
  KV* to = kv + destination * n;
  for (int64_t h = 0; h < heads.kv_heads; h++) {
    const long k = L::k_offset(h, dim), v = L::v_offset(h, heads.kv_heads, dim),
               used = L::v_used(tokens, dim);
    memcpy(to + k, from + k, L::k_used(tokens, dim) * sizeof(KV));
    memcpy(to + v, from + v, used * sizeof(KV));
    if constexpr (L::SCALED) {
      const long s = L::scale_offset(h, heads.kv_heads, dim);
      for (long part = s; part < s + L::scale_elements(); part += CHUNK * sizeof(bf16))
        memcpy(to + part, from + part, tokens * sizeof(bf16));
    }
    if (L::PAIRS && tokens % 2)
      for (long d = 1; d < 2 * dim; d += 2) to[v + used - 2 * dim + d] = 0;
  }
}

}  // namespace

void rms_norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x_type) {
    with_type(a.y_type, [&](auto y_type) {
      using X = Pointee<decltype(x_type)>;
      using Y = Pointee<decltype(y_type)>;
      for (int64_t r = begin; r < end; r++) {
        const int64_t at = r * a.x_stride;
        norm_row(a, static_cast<const X*>(a.x) + at,
                 a.residual ? static_cast<const X*>(a.residual) + at : nullptr,
                 a.sum ? static_cast<X*>(a.sum) + at : nullptr,
                 static_cast<Y*>(a.y) + r * a.y_stride);
      }
    });
  });
}

void rope_append_rows(const RopeArgs& a, int64_t begin, int64_t end) {
  with_type(a.heads.activation_type, [&](auto x_type) {
    with_kv_type(a.heads.kv_type, [&](auto kv_type) {
      for (int64_t r = begin; r < end; r++)
        rope_append_row<Pointee<decltype(x_type)>, Pointee<decltype(kv_type)>>(a, r);
    });
  });
}

int64_t append_boundary(const RopeArgs& a, int64_t row) {
  if (row <= 0 || row >= a.plan.num_rows) return row;
  return a.positions[row] % 2 && a.positions[row - 1] == a.positions[row] - 1 ? row + 1 : row;
}

void silu_and_mul_rows(const void* gate_up, void* y, int64_t size, int32_t type, int64_t begin,
                       int64_t end) {
  with_type(type, [&](auto pointer) {
    using X = Pointee<decltype(pointer)>;
    for (int64_t r = begin; r < end; r++) {
      const X* gate = static_cast<const X*>(gate_up) + r * 2 * size;
      X* to = static_cast<X*>(y) + r * size;
      each(size, [&](int64_t i, auto n) {
        constexpr int N = decltype(n)::value;
        const auto g = get<N>(gate + i), u = get<N>(gate + size + i);
        if constexpr (N == 1) put(to + i, g / (1.f + std::exp(-g)) * u);
        else store(to + i, silu<FINE>(g) * u);
      });
    }
  });
}

void copy_chunk(void* kv, const Heads& heads, int64_t source, int64_t destination, int64_t tokens) {
  with_kv_type(heads.kv_type, [&](auto type) {
    copy_tokens(static_cast<decltype(type)>(kv), heads, source, destination, tokens);
  });
}

}  // namespace chunkllama
