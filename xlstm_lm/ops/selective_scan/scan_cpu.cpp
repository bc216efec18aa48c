// Mamba-1's selective scan on a CPU: all states of a few vectors of units go through time together.
//
// A task takes one row of the batch and kVectors vectors of units. The forward pass keeps, besides its inputs, the
// states every kBlock steps; the backward pass takes the blocks from the last to the first and makes the states and
// decays of a block again before it runs the reverse recurrence over it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../by_dtype.h"
#include "../simd.h"

namespace {

constexpr int64_t kBlock = 32;   // steps between two checkpoints
constexpr int64_t kVectors = 4;  // vectors of units that a task takes, at most

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T> struct Problem {
  static constexpr int64_t W = Simd<T>::width;
  int64_t B, steps, E, N, groups;
  const T *x, *dt, *a, *b, *c, *initial;
  const bool* resets;

  Problem(
      const Tensor& x_, const Tensor& dt_, const Tensor& a_, const Tensor& b_, const Tensor& c_,
      const OptionalTensor& resets_, const OptionalTensor& initial_)
      : B(x_.size(0)), steps(x_.size(1)), E(x_.size(2)), N(a_.size(1)),
        groups((E + kVectors * W - 1) / (kVectors * W)), x(x_.const_data_ptr<T>()), dt(dt_.const_data_ptr<T>()),
        a(a_.const_data_ptr<T>()), b(b_.const_data_ptr<T>()), c(c_.const_data_ptr<T>()),
        initial(initial_ ? initial_->const_data_ptr<T>() : nullptr),
        resets(resets_ ? resets_->const_data_ptr<bool>() : nullptr) {}

  bool reset(int64_t row, int64_t step) const { return resets && resets[row * steps + step]; }
  int64_t unit(int64_t row, int64_t step, int64_t first) const { return (row * steps + step) * E + first; }
  int64_t shared(int64_t row, int64_t step) const { return (row * steps + step) * N; }

  // body(row, group, first unit, units) for every task.
  template <typename F> void for_each_task(F body) const {
    at::parallel_for(0, B * groups, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % groups * kVectors * W;
        body(task / groups, task % groups, first, std::min(kVectors * W, E - first));
      }
    });
  }

  // (unit, N) of memory to or from (vector, N, lane); what lies beyond the units is zero.
  void pack(T* to, const T* from, int64_t units) const {
    for (int64_t e = 0; e < units; ++e)
      for (int64_t n = 0; n < N; ++n) to[(e / W * N + n) * W + e % W] = from[e * N + n];
  }
  void unpack(T* to, const T* from, int64_t units) const {
    for (int64_t e = 0; e < units; ++e)
      for (int64_t n = 0; n < N; ++n) to[e * N + n] = from[(e / W * N + n) * W + e % W];
  }
};

template <typename T> void forward(const Problem<T>& p, T* y, T* last, T* checkpoints) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t row, int64_t, int64_t first, int64_t units) {
    const int64_t vectors = (units + W - 1) / W, size = vectors * p.N * W;
    Scratch<T> memory(2 * size);
    T *const a = memory.take(size), *const state = memory.take(size);
    p.pack(a, p.a + first * p.N, units);
    if (p.initial) p.pack(state, p.initial + (row * p.E + first) * p.N, units);
    for (int64_t t = 0; t < p.steps; ++t) {
      if (checkpoints && t % kBlock == 0)
        p.unpack(checkpoints + ((t / kBlock * p.B + row) * p.E + first) * p.N, state, units);
      if (p.reset(row, t)) std::fill_n(state, size, T(0));
      const T *const b = p.b + p.shared(row, t), *const c = p.c + p.shared(row, t);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = p.unit(row, t, first + v * W), count = units - v * W;
        const Vec<T> dt = load(p.dt + at, count), input = dt * load(p.x + at, count);
        Vec<T> sum{};
        for (int64_t n = 0; n < p.N; ++n) {
          const int64_t place = (v * p.N + n) * W;
          const Vec<T> s = exponential(dt * load(a + place)) * load(state + place) + input * b[n];
          store(state + place, s);
          sum += s * c[n];
        }
        store(y + at, sum, count);
      }
    }
    p.unpack(last + (row * p.E + first) * p.N, state, units);
  });
}

// Where the gradients go: x, dt (B, T, E); a (B, E, N); b, c (groups, B, T, N); the first state (B, E, N).
template <typename T> struct Gradients {
  T *x, *dt, *a, *b, *c, *initial;
};

template <typename T>
void backward(const Problem<T>& p, const T* checkpoints, const T* dy, const T* dlast, const Gradients<T>& out) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t row, int64_t group, int64_t first, int64_t units) {
    const int64_t vectors = (units + W - 1) / W, size = vectors * p.N * W;
    Scratch<T> memory((4 + 2 * kBlock) * size + 4 * vectors * W);
    T *const a = memory.take(size), *const state = memory.take(size);
    T *const da = memory.take(size), *const dstate = memory.take(size);
    T *const before = memory.take(kBlock * size), *const decays = memory.take(kBlock * size);
    T* of_units[4];  // dt, dt x, the gradient of dt x, and that of dt through the decay
    for (T*& each : of_units) each = memory.take(vectors * W);
    auto [dt, input, dinput, ddecay] = of_units;
    p.pack(a, p.a + first * p.N, units);
    if (dlast) p.pack(dstate, dlast + (row * p.E + first) * p.N, units);

    auto load_units = [&](int64_t t) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = p.unit(row, t, first + v * W), count = units - v * W;
        const Vec<T> step = load(p.dt + at, count);
        store(dt + v * W, step);
        store(input + v * W, step * load(p.x + at, count));
      }
    };

    for (int64_t begin = (p.steps - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
      const int64_t end = std::min(begin + kBlock, p.steps);
      p.pack(state, checkpoints + ((begin / kBlock * p.B + row) * p.E + first) * p.N, units);
      for (int64_t t = begin; t < end; ++t) {
        if (p.reset(row, t)) std::fill_n(state, size, T(0));
        load_units(t);
        const T* const b = p.b + p.shared(row, t);
        std::copy_n(state, size, before + (t - begin) * size);
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t n = 0; n < p.N; ++n) {
            const int64_t place = (v * p.N + n) * W;
            const Vec<T> decay = exponential(load(dt + v * W) * load(a + place));
            store(decays + (t - begin) * size + place, decay);
            store(state + place, decay * load(state + place) + load(input + v * W) * b[n]);
          }
      }
      for (int64_t t = end - 1; t >= begin; --t) {
        load_units(t);
        const T *const b = p.b + p.shared(row, t), *const c = p.c + p.shared(row, t);
        const T *const past = before + (t - begin) * size, *const decay = decays + (t - begin) * size;
        T *const db = out.b + group * p.B * p.steps * p.N + p.shared(row, t);
        T *const dc = out.c + group * p.B * p.steps * p.N + p.shared(row, t);
        const T carried = p.reset(row, t) ? T(0) : T(1);
        std::fill_n(dinput, vectors * W, T(0));
        std::fill_n(ddecay, vectors * W, T(0));
        for (int64_t n = 0; n < p.N; ++n) {
          Vec<T> sum_b{}, sum_c{};
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t place = (v * p.N + n) * W;
            const Vec<T> g = load(dy + p.unit(row, t, first + v * W), units - v * W);
            const Vec<T> kept = load(decay + place) * load(past + place), u = load(input + v * W);
            const Vec<T> ds = load(dstate + place) + g * c[n], dkept = ds * kept;
            sum_b += ds * u;
            sum_c += g * (kept + u * b[n]);
            store(dinput + v * W, load(dinput + v * W) + ds * b[n]);
            store(ddecay + v * W, load(ddecay + v * W) + dkept * load(a + place));
            store(da + place, load(da + place) + dkept * load(dt + v * W));
            store(dstate + place, ds * load(decay + place) * carried);
          }
          db[n] = total<T>(sum_b);
          dc[n] = total<T>(sum_c);
        }
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t at = p.unit(row, t, first + v * W), count = units - v * W;
          const Vec<T> du = load(dinput + v * W);
          store(out.x + at, du * load(dt + v * W), count);
          store(out.dt + at, load(ddecay + v * W) + du * load(p.x + at, count), count);
        }
      }
    }
    p.unpack(out.a + (row * p.E + first) * p.N, da, units);
    p.unpack(out.initial + (row * p.E + first) * p.N, dstate, units);
  });
}

// Exported models call these two with sources of their own, written by any version: keep what is given and returned.

// -> y (B, T, E) in the type of x, the last state (B, E, N), checkpoints (blocks, B, E, N) or empty unless `save`. dt, a
// and the state are of the type to compute in, the resets contiguous.
std::tuple<Tensor, Tensor, Tensor> scan_forward(
    const Tensor& x_, const Tensor& dt_, const Tensor& a, const Tensor& b_, const Tensor& c_,
    const OptionalTensor& resets, const OptionalTensor& initial, bool save) {
  const auto type = dt_.scalar_type();
  const Tensor x = x_.to(type).contiguous(), dt = dt_.contiguous();
  const Tensor b = b_.to(type).contiguous(), c = c_.to(type).contiguous();
  return by_dtype(dt, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, dt, a, b, c, resets, initial);
    const Tensor y = at::empty(x.sizes(), x.options()), last = at::empty({p.B, p.E, p.N}, x.options());
    const Tensor checkpoints = at::empty({save ? (p.steps + kBlock - 1) / kBlock : 0, p.B, p.E, p.N}, x.options());
    forward<T>(p, y.data_ptr<T>(), last.data_ptr<T>(), save ? checkpoints.data_ptr<T>() : nullptr);
    return std::make_tuple(y.to(x_.scalar_type()), last, checkpoints);
  });
}

// -> gradients of x, dt, a (to be summed over B), b, c (to be summed over a first dimension) and of the first state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& x_, const Tensor& dt_, const Tensor& a, const Tensor& b_, const Tensor& c_,
    const OptionalTensor& resets, const Tensor& checkpoints, const Tensor& dy_, const OptionalTensor& dlast) {
  const auto type = dt_.scalar_type();
  const Tensor x = x_.to(type).contiguous(), dt = dt_.contiguous(), dy = dy_.to(type).contiguous();
  const Tensor b = b_.to(type).contiguous(), c = c_.to(type).contiguous();
  return by_dtype(dt, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, dt, a, b, c, resets, std::nullopt);
    const Tensor dx = at::empty(x.sizes(), x.options()), ddt = at::empty(x.sizes(), x.options());
    const Tensor da = at::empty({p.B, p.E, p.N}, x.options()), dinitial = at::empty({p.B, p.E, p.N}, x.options());
    const Tensor db = at::empty({p.groups, p.B, p.steps, p.N}, x.options()), dc = at::empty(db.sizes(), x.options());
    backward<T>(
        p, checkpoints.const_data_ptr<T>(), dy.const_data_ptr<T>(), dlast ? dlast->const_data_ptr<T>() : nullptr,
        {dx.data_ptr<T>(), ddt.data_ptr<T>(), da.data_ptr<T>(), db.data_ptr<T>(), dc.data_ptr<T>(),
         dinitial.data_ptr<T>()});
    return std::make_tuple(dx.to(x_.scalar_type()), ddt, da, db, dc, dinitial);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xlstm_lm, library) {
  library.def(
      "scan_forward(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? resets, Tensor? initial, bool save)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "scan_backward(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? resets, Tensor checkpoints, Tensor dy,"
      " Tensor? dlast) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xlstm_lm, CPU, library) {
  library.impl("scan_forward", &scan_forward);
  library.impl("scan_backward", &scan_backward);
}
