// The sLSTM cell on a CPU: the recurrent product and the gates of a step in one pass over registers.
//
// R is block-diagonal, so a head of a row of the batch is a recurrence of its own. A task takes one head and a group
// of rows through all of time; its part of R stays in the cache. The forward pass keeps only y and, every kBlock
// steps, c, n and m. The backward pass takes the blocks from the last to the first: it makes the gates of a block
// again, for all its steps in one product because every y is known, keeps the factors that the reverse recurrence
// needs, runs it, and adds the block to the gradients of R and of the bias by one more product.
//
// Padding: a head's D units are laid out in vectors; what lies beyond D is zero on the way in and never written out.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cell.h"
#include "../by_dtype.h"
#include "../simd.h"

namespace {

constexpr int64_t kBlock = 32;                // steps between two checkpoints
constexpr int64_t kScratchBytes = 768 << 10;  // of a task in the backward pass, to stay in the L2 cache
constexpr int64_t kAhead = 8;                 // pairs of step and row by which inputs are fetched early
constexpr int64_t kFactors = 9;               // of each unit and step, for the reverse recurrence

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The sizes, the input with its strides, and how the work is shared out.
template <typename T> struct Problem {
  static constexpr int64_t W = Simd<T>::width;
  int64_t B, steps, H, D, vectors, padded;
  const T *wx, *r, *bias;
  int64_t wx_row, wx_step, wx_gate, wx_head;
  const bool* resets;
  int64_t rows_of_task, groups;

  Problem(const Tensor& wx_, const Tensor& r_, const Tensor& bias_, const OptionalTensor& resets_, int64_t most_rows)
      : B(wx_.size(0)), steps(wx_.size(1)), H(wx_.size(3)), D(wx_.size(4)), vectors((D + W - 1) / W),
        padded(vectors * W), wx(wx_.const_data_ptr<T>()), r(r_.const_data_ptr<T>()), bias(bias_.const_data_ptr<T>()),
        wx_row(wx_.stride(0)), wx_step(wx_.stride(1)), wx_gate(wx_.stride(2)), wx_head(wx_.stride(3)),
        resets(resets_ ? resets_->const_data_ptr<bool>() : nullptr) {
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = std::max(threads / std::gcd(H, threads), (B + most_rows - 1) / most_rows);
    rows_of_task = (B + wanted - 1) / wanted;
    if (rows_of_task > kTileRows) rows_of_task = (rows_of_task + kTileRows - 1) / kTileRows * kTileRows;
    groups = (B + rows_of_task - 1) / rows_of_task;
  }

  bool reset(int64_t row, int64_t step) const { return resets && resets[row * steps + step]; }
  const T* input(int64_t row, int64_t step, int64_t head) const {
    return wx + row * wx_row + step * wx_step + head * wx_head;
  }
  int64_t unit(int64_t row, int64_t head) const { return (row * H + head) * D; }
  int64_t unit(int64_t row, int64_t step, int64_t head) const { return ((row * steps + step) * H + head) * D; }

  template <typename F> void for_each_task(F body) const {
    at::parallel_for(0, H * groups, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / H * rows_of_task;
        body(task % H, task / H, first, std::min(rows_of_task, B - first));
      }
    });
  }

  // R of a head as (vector, D, gate, W): a panel of consecutive memory for each vector of units.
  std::vector<T> packed_weights(int64_t head) const {
    std::vector<T> out(vectors * D * 4 * W, T(0));
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t k = 0; k < D; ++k)
        for (int64_t e = 0; e < D; ++e)
          out[((e / W * D + k) * 4 + g) * W + e % W] = r[((g * H + head) * D + k) * D + e];
    return out;
  }
  // Its transpose as (gate, padded, padded).
  std::vector<T> transposed_weights(int64_t head) const {
    std::vector<T> out(4 * padded * padded, T(0));
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t k = 0; k < D; ++k)
        for (int64_t e = 0; e < D; ++e) out[(g * padded + e) * padded + k] = r[((g * H + head) * D + k) * D + e];
    return out;
  }
};

// y, c, n, m of a group of rows of one head: (row, padded) each.
template <typename T> struct GroupState {
  std::vector<T> y, c, n, m;
  GroupState(int64_t rows, int64_t padded)
      : y(rows * padded, T(0)), c(y), n(y), m(rows * padded, -std::numeric_limits<T>::infinity()) {}
  void empty(int64_t at, int64_t padded) {
    for (auto* part : {&y, &c, &n}) std::fill_n(part->begin() + at, padded, T(0));
    std::fill_n(m.begin() + at, padded, -std::numeric_limits<T>::infinity());
  }
  Cell<T> cell(int64_t at) const { return {load(&c[at]), load(&n[at]), load(&m[at])}; }
  void keep(int64_t at, const Cell<T>& cell) {
    store(&c[at], cell.c);
    store(&n[at], cell.n);
    store(&m[at], cell.m);
  }
};

template <typename T>
void forward(
    const Problem<T>& p, const std::vector<const T*>& initial, T* y_out, const std::vector<T*>& final_state,
    T* checkpoints) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t head, int64_t, int64_t first, int64_t rows) {
    // A short call reads R where it is; packing pays from a few steps on.
    const bool direct = p.steps < 4 && p.D % W == 0;
    const std::vector<T> packed = direct ? std::vector<T>() : p.packed_weights(head);
    const T* weights = direct ? p.r + head * p.D * p.D : packed.data();
    const int64_t weights_vector = direct ? W : p.D * 4 * W, weights_step = direct ? p.D : 4 * W;
    const int64_t weights_gate = direct ? p.H * p.D * p.D : W;

    GroupState<T> state(rows, p.padded);
    std::vector<T> y_next(rows * p.padded, T(0));
    if (!initial.empty())
      for (int64_t row = 0; row < rows; ++row) {
        T* const parts[] = {state.y.data(), state.c.data(), state.n.data(), state.m.data()};
        for (int part = 0; part < 4; ++part)
          std::copy_n(initial[part] + p.unit(first + row, head), p.D, parts[part] + row * p.padded);
      }

    for (int64_t t = 0; t < p.steps; ++t) {
      if (checkpoints && t % kBlock == 0)
        for (int64_t row = 0; row < rows; ++row) {
          T* to = checkpoints + t / kBlock * 3 * p.B * p.H * p.D + p.unit(first + row, head);
          for (const auto* part : {&state.c, &state.n, &state.m}) {
            std::copy_n(part->begin() + row * p.padded, p.D, to);
            to += p.B * p.H * p.D;
          }
        }
      for (int64_t row = 0; row < rows; ++row)
        if (p.reset(first + row, t)) state.empty(row * p.padded, p.padded);
      for (int64_t v = 0; v < p.vectors; ++v) {
        const int64_t count = p.D - v * W;
        in_tiles(rows, [&](int64_t row, auto tile) {
          Vec<T> gates[tile.value][4];
          for (int r = 0; r < tile.value; ++r)
            for (int g = 0; g < 4; ++g) {
              const T* from = p.input(first + row + r, t, head) + g * p.wx_gate + v * W;
              gates[r][g] = load(from, count) + load(p.bias + (g * p.H + head) * p.D + v * W, count);
              __builtin_prefetch(from + 2 * p.wx_step);
            }
          multiply_add<T, tile.value, 4>(
              gates, p.D, &state.y[row * p.padded], p.padded, 1, weights + v * weights_vector, weights_step,
              weights_gate);
          for (int r = 0; r < tile.value; ++r) {
            const int64_t at = (row + r) * p.padded + v * W;
            Cell<T> cell = state.cell(at);
            const Step<T> step = advance<T>(cell, gates[r]);
            state.keep(at, cell);
            store(&y_next[at], step.y);
            store(y_out + p.unit(first + row + r, t, head) + v * W, step.y, count);
          }
        });
      }
      state.y.swap(y_next);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* const parts[] = {state.c.data(), state.n.data(), state.m.data()};
      for (int part = 0; part < 3; ++part)
        std::copy_n(parts[part] + row * p.padded, p.D, final_state[part] + p.unit(first + row, head));
    }
  });
}

template <typename T> struct Saved {
  const T *y_initial, *y, *checkpoints, *dy, *dc_final, *dn_final;
};
template <typename T> struct Gradients {
  T *wx, *r_of_group, *bias_of_group, *y_initial, *c_initial, *n_initial;
};

template <typename T> void backward(const Problem<T>& p, const Saved<T>& saved, const Gradients<T>& out) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t head, int64_t group, int64_t first, int64_t rows) {
    const std::vector<T> weights = p.packed_weights(head), transposed = p.transposed_weights(head);
    const int64_t width = p.padded, slot = kFactors * width;
    std::vector<T> factors(kBlock * rows * slot), y_before(kBlock * rows * width, T(0));
    std::vector<T> dr(p.D * 4 * width, T(0)), dbias(4 * width, T(0));
    std::vector<T> dy(rows * width, T(0)), dc(dy), dn(dy);
    struct Pair {
      const T* input;
      int64_t state;
      bool reset;
    };
    std::vector<Pair> pairs(kBlock * rows + kAhead);  // (step, row) of a block: one row of its products
    if (saved.dc_final)
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(saved.dc_final + p.unit(first + row, head), p.D, &dc[row * width]);
        std::copy_n(saved.dn_final + p.unit(first + row, head), p.D, &dn[row * width]);
      }

    for (int64_t block = (p.steps - 1) / kBlock; block >= 0; --block) {
      const int64_t start = block * kBlock, length = std::min(kBlock, p.steps - start);
      for (int64_t t = 0; t < length; ++t)
        for (int64_t row = 0; row < rows; ++row) {
          const bool reset = p.reset(first + row, start + t);
          pairs[t * rows + row] = {p.input(first + row, start + t, head), row * width, reset};
          T* to = &y_before[(t * rows + row) * width];
          const T* from = start + t > 0 ? saved.y + p.unit(first + row, start + t - 1, head)
              : saved.y_initial         ? saved.y_initial + p.unit(first + row, head)
                                        : nullptr;
          if (from && !reset) std::copy_n(from, p.D, to);
          else std::fill_n(to, p.D, T(0));
        }
      GroupState<T> state(rows, width);
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = saved.checkpoints + block * 3 * p.B * p.H * p.D + p.unit(first + row, head);
        for (auto* part : {&state.c, &state.n, &state.m}) {
          std::copy_n(from, p.D, part->begin() + row * width);
          from += p.B * p.H * p.D;
        }
      }
      for (int64_t v = 0; v < p.vectors; ++v) {
        const int64_t count = p.D - v * W;
        in_tiles(length * rows, [&](int64_t pair, auto tile) {
          Vec<T> gates[tile.value][4];
          for (int r = 0; r < tile.value; ++r)
            for (int g = 0; g < 4; ++g) {
              gates[r][g] = load(pairs[pair + r].input + g * p.wx_gate + v * W, count) +
                  load(p.bias + (g * p.H + head) * p.D + v * W, count);
              __builtin_prefetch(pairs[pair + r + kAhead].input + g * p.wx_gate + v * W);
            }
          multiply_add<T, tile.value, 4>(
              gates, p.D, &y_before[pair * width], width, 1, &weights[v * p.D * 4 * W], 4 * W, W);
          for (int r = 0; r < tile.value; ++r) {
            const int64_t at = pairs[pair + r].state + v * W;
            if (pairs[pair + r].reset) {
              store(&state.c[at], Vec<T>{});
              store(&state.n[at], Vec<T>{});
              store(&state.m[at], splat(-std::numeric_limits<T>::infinity()));
            }
            Cell<T> cell = state.cell(at);
            const Step<T> s = advance<T>(cell, gates[r]);
            state.keep(at, cell);
            // sigmoid(-f), from e^-|f|
            const Vec<T> forget_closed =
                (gates[r][1] < T(0) ? splat(T(1)) : s.forget_odds) / (s.forget_odds + T(1));
            const Vec<T> values[kFactors] = {
                s.input * s.squashed,                                  // di from dc
                s.forget * forget_closed * s.c_before,                 // df from dc
                s.input * (T(1) - s.squashed * s.squashed),            // dz from dc
                s.y * s.output_odds * s.per_normalizer * cell.n,       // do from dy
                s.input,                                               // di from dn
                s.forget * forget_closed * s.n_before,                 // df from dn
                s.per_normalizer,                                      // dc from dy
                s.y / cell.n,                                          // -dn from dy
                s.forget,                                              // dc and dn from those of the step after
            };
            for (int k = 0; k < kFactors; ++k) store(&factors[(pair + r) * slot + k * width + v * W], values[k]);
          }
        });
      }
      // The reverse recurrence; the four gate gradients take the place of the first four factors.
      for (int64_t t = length - 1; t >= 0; --t) {
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t v = 0; v < p.vectors; ++v) {
            const int64_t at = row * width + v * W, count = p.D - v * W, unit = p.unit(first + row, start + t, head);
            T* f = &factors[(t * rows + row) * slot + v * W];
            const Vec<T> dy_ = load(&dy[at]) + load(saved.dy + unit + v * W, count);
            const Vec<T> dc_ = load(&dc[at]) + dy_ * load(f + 6 * width);
            const Vec<T> dn_ = load(&dn[at]) - dy_ * load(f + 7 * width);
            const Vec<T> dgates[4] = {
                load(f) * dc_ + load(f + 4 * width) * dn_,
                load(f + width) * dc_ + load(f + 5 * width) * dn_,
                load(f + 2 * width) * dc_,
                load(f + 3 * width) * dy_,
            };
            const bool reset = p.reset(first + row, start + t);
            store(&dc[at], reset ? Vec<T>{} : dc_ * load(f + 8 * width));
            store(&dn[at], reset ? Vec<T>{} : dn_ * load(f + 8 * width));
            T* dwx = out.wx + ((first + row) * p.steps + start + t) * 4 * p.H * p.D + head * p.D + v * W;
            for (int g = 0; g < 4; ++g) {
              store(f + g * width, dgates[g]);
              store(dwx + g * p.H * p.D, dgates[g], count);
              T* sum = &dbias[g * width + v * W];
              store(sum, load(sum) + dgates[g]);
            }
          }
        product<false>(
            dy.data(), width, rows, p.vectors, 4 * width, &factors[t * rows * slot], slot, 1, transposed.data(), width);
        for (int64_t row = 0; row < rows; ++row)
          if (p.reset(first + row, start + t)) std::fill_n(&dy[row * width], width, T(0));
      }
      constexpr int64_t depth = 64;  // so that the panels of the gate gradients stay in the L1 cache
      for (int64_t pair = 0; pair < length * rows; pair += depth)
        product<true>(
            dr.data(), 4 * width, p.D, 4 * p.vectors, std::min(depth, length * rows - pair), &y_before[pair * width], 1,
            width, &factors[pair * slot], slot);
    }

    for (int64_t g = 0; g < 4; ++g) {
      const int64_t to = (group * 4 + g) * p.H + head;
      for (int64_t k = 0; k < p.D; ++k)
        std::copy_n(&dr[(k * 4 + g) * width], p.D, out.r_of_group + (to * p.D + k) * p.D);
      std::copy_n(&dbias[g * width], p.D, out.bias_of_group + to * p.D);
    }
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(&dy[row * width], p.D, out.y_initial + p.unit(first + row, head));
      std::copy_n(&dc[row * width], p.D, out.c_initial + p.unit(first + row, head));
      std::copy_n(&dn[row * width], p.D, out.n_initial + p.unit(first + row, head));
    }
  });
}

// -> y (B, T, H, D); c, n, m (B, H, D) after the last step; checkpoints (blocks, 3, B, H, D), or empty unless `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slstm_forward(
    const Tensor& wx, const Tensor& r, const Tensor& bias, const OptionalTensor& resets, const OptionalTensor& y_initial,
    const OptionalTensor& c_initial, const OptionalTensor& n_initial, const OptionalTensor& m_initial, bool save) {
  return by_dtype(wx, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(wx, r, bias, resets, 64);
    const Tensor y = at::empty({p.B, p.steps, p.H, p.D}, wx.options());
    const int64_t blocks = save ? (p.steps + kBlock - 1) / kBlock : 0;
    const Tensor checkpoints = at::empty({blocks, 3, p.B, p.H, p.D}, wx.options());
    std::vector<const T*> initial;
    for (const OptionalTensor* part : {&y_initial, &c_initial, &n_initial, &m_initial})
      if (*part) initial.push_back((*part)->const_data_ptr<T>());
    std::vector<Tensor> final_state;
    std::vector<T*> final_pointers;
    for (int part = 0; part < 3; ++part) {
      final_state.push_back(at::empty({p.B, p.H, p.D}, wx.options()));
      final_pointers.push_back(final_state.back().template data_ptr<T>());
    }
    forward<T>(p, initial, y.data_ptr<T>(), final_pointers, save ? checkpoints.data_ptr<T>() : nullptr);
    return std::make_tuple(y, final_state[0], final_state[1], final_state[2], checkpoints);
  });
}

// -> gradients of wx, r and bias, and of y, c, n of the initial state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> slstm_backward(
    const Tensor& wx, const Tensor& r, const Tensor& bias, const OptionalTensor& resets,
    const OptionalTensor& y_initial, const Tensor& y, const Tensor& checkpoints, const Tensor& dy,
    const OptionalTensor& dc_final, const OptionalTensor& dn_final) {
  return by_dtype(wx, [&](auto zero) {
    using T = decltype(zero);
    const int64_t padded = (wx.size(4) + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
    const int64_t row_bytes = kBlock * (kFactors + 1) * padded * sizeof(T);
    const Problem<T> p(wx, r, bias, resets, std::max<int64_t>(8, kScratchBytes / row_bytes));
    const Tensor dwx = at::empty({p.B, p.steps, 4, p.H, p.D}, wx.options());
    const Tensor dr = at::empty({p.groups, 4, p.H, p.D, p.D}, wx.options());
    const Tensor dbias = at::empty({p.groups, 4, p.H, p.D}, wx.options());
    const Tensor dy_initial = at::empty({p.B, p.H, p.D}, wx.options());
    const Tensor dc_initial = at::empty({p.B, p.H, p.D}, wx.options());
    const Tensor dn_initial = at::empty({p.B, p.H, p.D}, wx.options());
    auto pointer = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<T>() : nullptr; };
    const Saved<T> saved{pointer(y_initial), pointer(y),        pointer(checkpoints),
                         pointer(dy),        pointer(dc_final), pointer(dn_final)};
    backward<T>(
        p, saved,
        {dwx.data_ptr<T>(), dr.data_ptr<T>(), dbias.data_ptr<T>(), dy_initial.data_ptr<T>(), dc_initial.data_ptr<T>(),
         dn_initial.data_ptr<T>()});
    return std::make_tuple(dwx, dr.sum(0), dbias.sum(0), dy_initial, dc_initial, dn_initial);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xlstm_lm, library) {
  library.def(
      "slstm_forward(Tensor wx, Tensor r, Tensor bias, Tensor? resets, Tensor? y_initial, Tensor? c_initial,"
      " Tensor? n_initial, Tensor? m_initial, bool save)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "slstm_backward(Tensor wx, Tensor r, Tensor bias, Tensor? resets, Tensor? y_initial, Tensor y,"
      " Tensor checkpoints, Tensor dy, Tensor? dc_final, Tensor? dn_final)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xlstm_lm, CPU, library) {
  library.impl("slstm_forward", &slstm_forward);
  library.impl("slstm_backward", &slstm_backward);
}
