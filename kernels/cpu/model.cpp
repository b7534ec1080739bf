// A whole forward pass in one parallel region: embedding, all layers, final norm. The residual stream is float; a layer is
//
//   norm | qkv | rotate and append | attention | merge | output projection added | norm | gate and up | down added
//
// with a barrier after each phase. Linears and attention hand out their work unit by unit, the rest by rows.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "elementwise.h"
#include "layout.h"
#include "linear.h"
#include "team.h"

namespace chunkllama {
namespace {

// An odd number of cache lines of bf16, so that the rows of a tile do not fall into the same few sets.
constexpr int64_t stride(int64_t size) { return (size + 63) / 64 * 64 + 32; }

enum Phase { QKV, ATTENTION, OUTPUT, GATE_UP, DOWN, PHASES };

class Pass {
 public:
  Pass(const Model& m, const Step& s, int threads)
      : m_(m), s_(s), threads_(threads), panels_((s.plan.num_rows - 1) / panel_rows(s.plan.num_rows, threads) + 1),
        counters_(new Counter[m.num_layers * PHASES * panels_]) {
    const int32_t* single = s.plan.row_flags;
    merges_ = std::find(single, single + s.plan.num_rows, 0) != single + s.plan.num_rows;
  }

  void run(int thread, int threads) {
    const Range rows = share(s_.plan.num_rows, thread, threads);
    for (int64_t r = rows.begin; r < rows.end; r++) embed(r);
    for (int64_t i = 0; i < m_.num_layers; i++) layer(i, thread, threads, rows);
    norm(m_.final_norm, s_.hidden, F32, rows);
  }

 private:
  void embed(int64_t row) {
    float* to = s_.hidden + row * stride(m_.hidden);
    const int64_t id = s_.token_ids[row];
    if (!m_.embedding) {
      unpack_row(m_.head, id, to, m_.hidden);
      return;
    }
    for (int64_t i = 0; i < m_.hidden; i++)
      to[i] = m_.embedding_type == BF16 ? to_float(static_cast<const bf16*>(m_.embedding)[id * m_.hidden + i])
                                        : static_cast<const float*>(m_.embedding)[id * m_.hidden + i];
  }

  void layer(int64_t index, int thread, int threads, Range rows) {
    const Layer& l = m_.layers[index];
    Counter* counters = counters_.get() + index * PHASES * panels_;
    const int64_t width = stride(m_.heads.q_heads * m_.heads.head_dim), qkv_stride = l.qkv.n;
    auto linear = [&](Phase phase, const Linear& weight, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                      Type y_type, Epilogue epilogue) {
      const LinearArgs a{&weight, x, x_stride, activations(), y, y_stride, y_type, epilogue, s_.plan.num_rows};
      linear_units(a, counters + phase * panels_, thread, threads_);
      barrier_.wait(threads);
    };

    norm(l.attention_norm, s_.normed, activations(), rows);
    barrier_.wait(threads);
    linear(QKV, l.qkv, s_.normed, stride(m_.hidden), s_.qkv, qkv_stride, activations(), STORE);

    const RopeArgs rope{s_.plan, m_.heads, s_.positions, s_.cos_sin, s_.qkv, s_.qkv, qkv_stride, qkv_stride, s_.kv[index]};
    rope_append_rows(rope, append_boundary(rope, rows.begin), append_boundary(rope, rows.end));
    barrier_.wait(threads);

    const AttentionArgs attention{s_.plan, m_.heads, s_.positions, s_.qkv, s_.attention, qkv_stride, width, s_.kv[index],
                                  s_.partial_out, s_.partial_lse, m_.scale, m_.vector_rows};
    attention_units(attention, counters[ATTENTION * panels_]);
    barrier_.wait(threads);
    if (merges_) {
      const Range merged = share(s_.plan.num_rows * m_.heads.q_heads, thread, threads);
      merge_partials(attention, merged.begin, merged.end);
      barrier_.wait(threads);
    }

    linear(OUTPUT, l.o, s_.attention, width, s_.hidden, stride(m_.hidden), F32, ADD);
    norm(l.mlp_norm, s_.normed, activations(), rows);
    barrier_.wait(threads);
    linear(GATE_UP, l.gate_up, s_.normed, stride(m_.hidden), s_.mlp, stride(l.down.k), activations(), SILU_AND_MUL);
    linear(DOWN, l.down, s_.mlp, stride(l.down.k), s_.hidden, stride(m_.hidden), F32, ADD);
  }

  Type activations() const { return Type(m_.heads.activation_type); }

  void norm(const float* weight, void* y, Type y_type, Range rows) {
    const NormArgs a{s_.hidden, nullptr, nullptr, y, weight, m_.hidden, stride(m_.hidden), stride(m_.hidden), F32, y_type, m_.eps};
    rms_norm_rows(a, rows.begin, rows.end);
  }

  const Model& m_;
  const Step& s_;
  const int threads_;  // as asked for: the team may be smaller, but the panels are cut once
  const int64_t panels_;  // of rows, each with a counter for every linear
  std::unique_ptr<Counter[]> counters_;
  bool merges_;  // some row has several partials
  Barrier barrier_;
};

}  // namespace
}  // namespace chunkllama

using namespace chunkllama;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The type activations have in a model whose weights have this type.
EXPORT int32_t ck_activation_type(int32_t weight_type) { return weight_type == F32 ? F32 : NARROW_ACTIVATIONS; }

EXPORT void ck_forward(const Model* model, const Step* step, int threads) {
  Pass pass(*model, *step, threads);
  parallel(threads, [&](int thread, int team) { pass.run(thread, team); });
}

// One linear layer on x of the model's activation type: y [rows, y_stride] float.
EXPORT void ck_linear(const Linear* linear, const void* x, int64_t x_stride, int32_t x_type, float* y, int64_t y_stride,
                      int64_t rows, int threads) {
  const LinearArgs args{linear, x, x_stride, x_type, y, y_stride, F32, STORE, rows};
  const std::unique_ptr<Counter[]> panels(new Counter[rows / panel_rows(rows, threads) + 1]);
  parallel(threads, [&](int thread, int) { linear_units(args, panels.get(), thread, threads); });
}

EXPORT void ck_pack(const void* w, int32_t w_type, int64_t n, int64_t k, const Linear* packed, int threads) {
  Counter units;
  parallel(threads, [&](int, int) {
    for (int64_t u; (u = units.take()) < packed->n / UNIT;) pack_units(w, w_type, n, k, *packed, u, u + 1);
  });
}
