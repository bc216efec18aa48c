// The causal depthwise convolution on a CPU. A task takes one row of the batch and a few vectors of channels through
// time, block by block, with the last inputs of a vector in registers: each entry is read and written once.

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

constexpr int64_t kSteps = 32;   // of a block
constexpr int64_t kVectors = 4;  // of channels that a task takes, at most
constexpr int kMostTaps = 8;

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor (B, T, D) whose channels lie side by side.
template <typename T> struct Sequences {
  const T* data;
  int64_t row, step;

  explicit Sequences(const Tensor& x) : data(x.const_data_ptr<T>()), row(x.stride(0)), step(x.stride(1)) {}
  const T* at(int64_t b, int64_t t) const { return data + b * row + t * step; }
};

template <typename T> struct Problem {
  int64_t B, steps, D;
  Sequences<T> x;
  const T* weights;  // (taps, D), the newest input's last
  const int64_t* documents;

  Problem(const Tensor& x_, const Tensor& taps, const OptionalTensor& documents_)
      : B(x_.size(0)), steps(x_.size(1)), D(x_.size(2)), x(x_), weights(taps.const_data_ptr<T>()),
        documents(documents_ ? documents_->const_data_ptr<int64_t>() : nullptr) {}

  bool starts(int64_t b, int64_t t) const {
    return documents && t > 0 && documents[b * steps + t] != documents[b * steps + t - 1];
  }

  // body(row, first channel, vectors) for every task.
  template <typename F> void for_each_task(F body) const {
    constexpr int64_t kChannels = kVectors * Simd<T>::width;
    const int64_t groups = (D + kChannels - 1) / kChannels;
    at::parallel_for(0, B * groups, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % groups * kChannels;
        body(task / groups, first, std::min(kVectors, (D - first + Simd<T>::width - 1) / Simd<T>::width));
      }
    });
  }
};

// The entry of a step and of its TAPS - 1 neighbours on one side, the nearest first; those of other documents are zero.
template <typename T, int TAPS> struct Window {
  Vec<T> entries[TAPS];

  explicit Window(const T* from) {
    for (int i = 0; i < TAPS; ++i) entries[i] = load(from + i * Simd<T>::width);
  }
  void save(T* to) const {
    for (int i = 0; i < TAPS; ++i) store(to + i * Simd<T>::width, entries[i]);
  }
  void push(Vec<T> entry, bool alone) {
    for (int i = TAPS - 1; i > 0; --i) entries[i] = alone ? Vec<T>{} : entries[i - 1];
    entries[0] = entry;
  }
};

// The weights of a vector of channels by age, the newest input's first.
template <typename T, int TAPS> struct Taps {
  Vec<T> by_age[TAPS];

  Taps(const Problem<T>& p, int64_t channel) {
    for (int age = 0; age < TAPS; ++age)
      by_age[age] = load(p.weights + (TAPS - 1 - age) * p.D + channel, p.D - channel);
  }
};

template <typename T, int TAPS> void forward(const Problem<T>& p, const T* bias, T* y) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t b, int64_t first, int64_t vectors) {
    Scratch<T> memory(kVectors * TAPS * W);
    T* const windows = memory.take(kVectors * TAPS * W);
    for (int64_t begin = 0; begin < p.steps; begin += kSteps) {
      const int64_t end = std::min(begin + kSteps, p.steps);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t channel = first + v * W, count = p.D - channel;
        const Taps<T, TAPS> taps(p, channel);
        const Vec<T> shift = bias ? load(bias + channel, count) : Vec<T>{};
        Window<T, TAPS> past(windows + v * TAPS * W);
        for (int64_t t = begin; t < end; ++t) {
          past.push(load(p.x.at(b, t) + channel, count), p.starts(b, t));
          Vec<T> sum = shift;
          for (int age = 0; age < TAPS; ++age) sum += taps.by_age[age] * past.entries[age];
          store(y + (b * p.steps + t) * p.D + channel, sum, count);
        }
        past.save(windows + v * TAPS * W);
      }
    }
  });
}

// dx (B, T, D); dtaps (B, taps, D) and dbias (B, D) are those of each row. Goes from the last step to the first.
template <typename T, int TAPS>
void backward(const Problem<T>& p, const Sequences<T>& dy, T* dx, T* dtaps, T* dbias) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t b, int64_t first, int64_t vectors) {
    Scratch<T> memory(kVectors * (2 * TAPS + 1) * W);
    T *const windows = memory.take(kVectors * TAPS * W), *const sums = memory.take(kVectors * (TAPS + 1) * W);
    for (int64_t begin = (p.steps - 1) / kSteps * kSteps; begin >= 0; begin -= kSteps) {
      const int64_t end = std::min(begin + kSteps, p.steps);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t channel = first + v * W, count = p.D - channel;
        const Taps<T, TAPS> taps(p, channel);
        Window<T, TAPS> coming(windows + v * TAPS * W);
        Vec<T> of_block[TAPS + 1] = {};
        for (int64_t t = end - 1; t >= begin; --t) {
          coming.push(load(dy.at(b, t) + channel, count), t + 1 < p.steps && p.starts(b, t + 1));
          const Vec<T> x = load(p.x.at(b, t) + channel, count);
          Vec<T> sum{};
          for (int age = 0; age < TAPS; ++age) {
            sum += taps.by_age[age] * coming.entries[age];
            of_block[age] += x * coming.entries[age];
          }
          of_block[TAPS] += coming.entries[0];
          store(dx + (b * p.steps + t) * p.D + channel, sum, count);
        }
        coming.save(windows + v * TAPS * W);
        for (int i = 0; i <= TAPS; ++i) {
          T* const to = sums + (v * (TAPS + 1) + i) * W;
          store(to, load(to) + of_block[i]);
        }
      }
    }
    for (int64_t v = 0; v < vectors; ++v)
      for (int i = 0; i <= TAPS; ++i) {
        T* const to = i < TAPS ? dtaps + (b * TAPS + TAPS - 1 - i) * p.D : dbias + b * p.D;
        store(to + first + v * W, load(sums + (v * (TAPS + 1) + i) * W), p.D - first - v * W);
      }
  });
}

// body(taps as a compile-time constant).
template <int TAPS = kMostTaps, typename F> void with_taps(int64_t taps, F body) {
  TORCH_CHECK(taps <= TAPS && taps > 0, "the CPU kernel takes 1 to ", kMostTaps, " taps");
  if (taps == TAPS) body(std::integral_constant<int, TAPS>{});
  else if constexpr (TAPS > 1) with_taps<TAPS - 1>(taps, body);
}

// Exported models call these two with sources of their own, written by any version: keep what is given and returned.

// -> y (B, T, D) in the type of x. x is (B, T, D), taps (W, D), documents (B, T) int64, the latter two dense. taps and
// bias are of the type to compute in.
Tensor conv_forward(
    const Tensor& x_, const Tensor& taps, const OptionalTensor& bias, const OptionalTensor& documents) {
  const Tensor x = readable(x_, compute_type(x_)), y = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, taps, documents);
    with_taps(taps.size(0), [&](auto count) {
      forward<T, count.value>(p, bias ? bias->const_data_ptr<T>() : nullptr, y.data_ptr<T>());
    });
  });
  return y.to(x_.scalar_type());
}

// -> gradients of x, of the taps and of the bias, the latter two for each row.
std::tuple<Tensor, Tensor, Tensor> conv_backward(
    const Tensor& x_, const Tensor& taps, const OptionalTensor& documents, const Tensor& dy_) {
  const Tensor x = readable(x_, compute_type(x_)), dy = readable(dy_, compute_type(x_));
  const int64_t B = x.size(0), D = x.size(2);
  const Tensor dx = at::empty(x.sizes(), x.options()), dbias = at::empty({B, D}, x.options());
  const Tensor dtaps = at::empty({B, taps.size(0), D}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, taps, documents);
    with_taps(taps.size(0), [&](auto count) {
      backward<T, count.value>(p, Sequences<T>(dy), dx.data_ptr<T>(), dtaps.data_ptr<T>(), dbias.data_ptr<T>());
    });
  });
  return {dx.to(x_.scalar_type()), dtaps, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xlstm_lm, library) {
  library.def("conv_forward(Tensor x, Tensor taps, Tensor? bias, Tensor? documents) -> Tensor");
  library.def("conv_backward(Tensor x, Tensor taps, Tensor? documents, Tensor dy) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xlstm_lm, CPU, library) {
  library.impl("conv_forward", &conv_forward);
  library.impl("conv_backward", &conv_backward);
}
