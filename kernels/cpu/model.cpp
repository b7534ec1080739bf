// A whole forward pass in one parallel region: embedding, all layers, final norm. The residual
// stream is float; a layer is
//
//   norm | qkv | rotate and append | attention | merge | output projection added | norm |
//   gate and up | down added
//
// each a phase. Of the two products of an adapter, the first is computed with the norm before qkv
// and before gate and up, and the second as their units are finished; with the output and down
// projections the first is computed beside their units, and the norm behind them adds the second.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "adapter.h"
#include "attention.h"
#include "elementwise.h"
#include "layout.h"
#include "linear.h"
#include "team.h"

namespace chunkllama {
namespace {

// An odd number of cache lines of bf16, so that the rows of a tile do not map to the same few sets.
constexpr int64_t stride(int64_t size) { return (size + 63) / 64 * 64 + 32; }

// Phases of a layer; a linear has one for each panel, and two another one for adapters.
constexpr int64_t LINEARS = 4, INNERS = 2, OTHERS = 5;
enum LinearOfLayer : int64_t { QKV, OUTPUT, GATE_UP, DOWN };
constexpr int64_t NO_LINEAR = -1;

class Pass {
 public:
  Pass(const Model& m, const Step& s, int threads)
      : m_(m),
        s_(s),
        threads_(threads),
        rows_(s.plan.num_rows),
        panels_((rows_ - 1) / panel_rows(rows_, threads) + 1),
        has_adapters_(s.adapters.num_ranges > 0),
        phases_(new Phase[m.num_layers * (LINEARS * panels_ + INNERS + OTHERS) + 2]) {
    const int32_t* single = s.plan.row_flags;
    merges_ = std::find(single, single + rows_, 0) != single + rows_;
  }

  void run(int thread) {
    Phase* phase = phases_.get();
    by_rows(*phase++, rows_, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) embed(r);
    });
    for (int64_t i = 0; i < m_.num_layers; i++) phase = layer(i, thread, phase);
    norm(*phase, m_.final_norm, s_.hidden, F32, (m_.num_layers - 1) * LINEARS + DOWN, NO_LINEAR);
  }

 private:
  void embed(int64_t row) {
    float* to = s_.hidden + row * stride(m_.hidden);
    const int64_t id = s_.token_ids[row];
    if (!m_.embedding) {
      unpack_row(m_.packed_embedding, m_.head.k, id, to, m_.hidden);
      return;
    }
    for (int64_t i = 0; i < m_.hidden; i++)
      to[i] = m_.embedding_type == BF16
                  ? to_float(static_cast<const bf16*>(m_.embedding)[id * m_.hidden + i])
                  : static_cast<const float*>(m_.embedding)[id * m_.hidden + i];
  }

  // Returns the phase after its own.
  Phase* layer(int64_t index, int thread, Phase* phase) {
    const Layer& l = m_.layers[index];
    const int64_t width = stride(m_.heads.q_heads * m_.heads.head_dim), qkv_stride = l.qkv.n;
    const int64_t number = index * LINEARS;
    auto args_of = [&](const Linear& weight, const void* x, int64_t x_stride, void* y,
                       int64_t y_stride, Type y_type, Epilogue epilogue) {
      return LinearArgs{&weight, x,        x_stride, activations(), y,
                        y_stride, y_type, epilogue, rows_};
    };
    // A linear of normalised rows: the norm has computed the adapters' first product.
    auto linear = [&](LinearArgs a, int64_t which) {
      const AdapterArgs adapters = adapters_of(number + which);
      if (has_adapters_ && is_adapted(adapters)) a.adapters = &adapters;
      linear_units(a, phase, thread, threads_);
      phase += panels_;
    };
    // A linear that is added to the residual stream: the next norm adds the adapters' part.
    auto added = [&](const LinearArgs& a, int64_t which) {
      const AdapterArgs adapters = adapters_of(number + which, a.x, a.x_stride);
      int64_t units = 0;
      if (has_adapters_ && is_adapted(adapters)) units = take_inner(adapters, *phase, threads_);
      linear_units(a, phase + 1, thread, threads_);
      phase->wait(units);
      phase += 1 + panels_;
    };

    norm(*phase++, l.attention_norm, s_.normed, activations(),
         index ? number - LINEARS + DOWN : NO_LINEAR, number + QKV);
    linear(args_of(l.qkv, s_.normed, stride(m_.hidden), s_.qkv, qkv_stride, activations(), STORE),
           QKV);

    const RopeArgs rope{s_.plan, m_.heads,   s_.positions, s_.cos_sin,  s_.qkv,
                        s_.qkv,  qkv_stride, qkv_stride,   s_.kv[index]};
    by_rows(*phase++, rows_, [&](int64_t begin, int64_t end) {
      rope_append_rows(rope, append_boundary(rope, begin), append_boundary(rope, end));
    });

    const AttentionArgs attention{s_.plan,        m_.heads,       s_.positions, s_.qkv,
                                  s_.attention,   qkv_stride,     width,        s_.kv[index],
                                  s_.partial_out, s_.partial_lse, m_.scale,     0.f,
                                  m_.vector_rows, m_.independent_rows};
    attention_units(attention, *phase++);
    if (merges_)
      by_rows(*phase, rows_ * m_.heads.q_heads,
              [&](int64_t begin, int64_t end) { merge_partials(attention, begin, end); });
    phase++;

    yield_core();  // twice a layer: yielding after each phase gained no more under the server
    added(args_of(l.o, s_.attention, width, s_.hidden, stride(m_.hidden), F32, ADD), OUTPUT);
    norm(*phase++, l.mlp_norm, s_.normed, activations(), number + OUTPUT, number + GATE_UP);
    linear(args_of(l.gate_up, s_.normed, stride(m_.hidden), s_.mlp, stride(l.down.k),
                   activations(), SILU_AND_MUL),
           GATE_UP);
    yield_core();
    added(args_of(l.down, s_.mlp, stride(l.down.k), s_.hidden, stride(m_.hidden), F32, ADD), DOWN);
    return phase;
  }

  // What the adapters need of a linear layer, the number'th of all.
  AdapterArgs adapters_of(int64_t number, const void* x = nullptr, int64_t x_stride = 0) const {
    const StepAdapters& s = s_.adapters;
    return {s.ranges,  s.num_ranges, number,         s.type, x, x_stride, activations(), s.inner,
            s.inner_stride, m_.independent_rows != 0};
  }

  Type activations() const { return Type(m_.heads.activation_type); }

  template <class F>
  void by_rows(Phase& phase, int64_t count, F&& work) {
    phase.run(count, row_grain(count, threads_), work);
  }

  // Norms the rows. First adds what the adapters add to linear layer `before`, then computes their
  // first product for layer `after`.
  void norm(Phase& phase, const float* weight, void* y, Type y_type, int64_t before,
            int64_t after) {
    const int64_t width = stride(m_.hidden);
    const NormArgs a{s_.hidden, nullptr, nullptr, y, weight, m_.hidden, width, width, F32, y_type,
                     m_.eps};
    by_rows(phase, rows_, [&](int64_t begin, int64_t end) {
      if (has_adapters_ && before != NO_LINEAR)
        add_outer(adapters_of(before), begin, end, 0, m_.hidden, s_.hidden + begin * width, width);
      rms_norm_rows(a, begin, end);
      if (has_adapters_ && after != NO_LINEAR) fill_inner(adapters_of(after, y, width), begin, end);
    });
  }

  const Model& m_;
  const Step& s_;
  const int threads_;  // requested: the team may be smaller, but the panels are cut once
  const int64_t rows_, panels_;
  const bool has_adapters_;
  const std::unique_ptr<Phase[]> phases_;  // in the order of the work
  bool merges_;                            // some row has several partials
};

}  // namespace
}  // namespace chunkllama

using namespace chunkllama;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The type activations have in a model whose weights have this type.
EXPORT int32_t ck_activation_type(int32_t weight_type) {
  return weight_type == F32 ? F32 : NARROW_ACTIVATIONS;
}

EXPORT void ck_forward(const Model* model, const Step* step, int threads) {
  Pass pass(*model, *step, threads);
  parallel(threads, [&](int thread, int) { pass.run(thread); });
}

// One linear layer on x of the model's activation type: y [rows, y_stride] float.
EXPORT void ck_linear(const Linear* linear, const void* x, int64_t x_stride, int32_t x_type,
                      float* y, int64_t y_stride, int64_t rows, int threads) {
  const LinearArgs args{linear, x, x_stride, x_type, y, y_stride, F32, STORE, rows};
  const std::unique_ptr<Phase[]> panels(new Phase[rows / panel_rows(rows, threads) + 1]);
  parallel(threads, [&](int thread, int) { linear_units(args, panels.get(), thread, threads); });
}

// The largest of the first `columns` columns of each row (NaN if one is) and its index, which is
// all that greedy sampling needs of the head.
EXPORT void ck_best(const Linear* linear, const void* x, int64_t x_stride, int32_t x_type,
                    int64_t columns, float* values, int64_t* indices, int64_t rows, int threads) {
  const std::unique_ptr<Phase[]> panels(new Phase[rows / panel_rows(rows, threads) + 1]);
  std::vector<Best> found(threads * rows, {-INFINITY, 0});
  parallel(threads, [&](int thread, int) {
    const LinearArgs args{linear, x,   x_stride, x_type, nullptr,
                          0,      F32, BEST,     rows,   found.data() + thread * rows,
                          columns};
    linear_units(args, panels.get(), thread, threads);
  });
  for (int64_t r = 0; r < rows; r++) {
    Best best = found[r];
    for (int64_t i = r + rows; i < int64_t(found.size()); i += rows) {
      if (beats(found[i], best)) best = found[i];
    }
    values[r] = best.value, indices[r] = best.column;
  }
}

// Packs rows of w as columns [first, first + n) of `packed`; `first` is a multiple of 32, and what
// lies behind them in their last unit is zero.
EXPORT void ck_pack(const void* w, int32_t w_type, int64_t n, int64_t k, const Weights* packed,
                    int64_t packed_k, int64_t first, int threads) {
  Phase units;
  parallel(threads, [&](int, int) {
    units.run((n + UNIT - 1) / UNIT, 1, [&](int64_t begin, int64_t end) {
      pack_units(w, w_type, n, k, *packed, packed_k, first, first / UNIT + begin,
                 first / UNIT + end);
    });
  });
}

// The same from codes, a byte each, and 16-bit scales and extra values.
EXPORT void ck_pack_codes(const uint8_t* codes, const uint16_t* scales, const uint16_t* extra,
                          int64_t n, int64_t k, const Weights* packed, int64_t packed_k,
                          int64_t first, int threads) {
  const Codes given{codes, scales, extra, n, k};
  Phase units;
  parallel(threads, [&](int, int) {
    units.run((n + UNIT - 1) / UNIT, 1, [&](int64_t begin, int64_t end) {
      pack_codes(given, *packed, packed_k, first, first / UNIT + begin, first / UNIT + end);
    });
  });
}

// Columns [first, first + n) of packed weights as floats, y [n, k].
EXPORT void ck_unpack(const Weights* packed, int64_t packed_k, int64_t first, int64_t n, int64_t k,
                      float* y, int threads) {
  Phase rows;
  parallel(threads, [&](int, int) {
    rows.run(n, row_grain(n, threads), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) unpack_row(*packed, packed_k, first + i, y + i * k, k);
    });
  });
}
