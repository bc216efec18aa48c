// The gated delta rule on a CPU: the state of one head of one row goes through time step by step, in the cache.
//
// The forward pass keeps, besides its inputs, the states every kBlock steps. The backward pass takes the blocks from the
// last to the first, makes the states before each step of a block again, and runs the reverse recurrence over them.
//
// A state is a matrix of K rows of whole vectors; what lies beyond the V columns is zero.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../by_dtype.h"
#include "../simd.h"

namespace {

constexpr int64_t kBlock = 32;  // steps between two kept states

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T> struct Problem {
  static constexpr int64_t W = Simd<T>::width;
  int64_t B, steps, H, K, V, vectors, columns, blocks;
  T scale;
  const T *q, *k, *v, *log_decay, *beta;
  const bool* resets;

  Problem(
      const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_decay_, const Tensor& beta_,
      const OptionalTensor& resets_)
      : B(q_.size(0)), steps(q_.size(1)), H(q_.size(2)), K(q_.size(3)), V(v_.size(3)), vectors((V + W - 1) / W),
        columns(vectors * W), blocks((steps + kBlock - 1) / kBlock), scale(1 / std::sqrt(T(K))),
        q(q_.const_data_ptr<T>()), k(k_.const_data_ptr<T>()), v(v_.const_data_ptr<T>()),
        log_decay(log_decay_.const_data_ptr<T>()), beta(beta_.const_data_ptr<T>()),
        resets(resets_ ? resets_->const_data_ptr<bool>() : nullptr) {}

  int64_t state_size() const { return K * columns; }
  int64_t at(int64_t row, int64_t step, int64_t head) const { return (row * steps + step) * H + head; }
  int64_t kept_at(int64_t row, int64_t head, int64_t block) const {
    return ((row * H + head) * blocks + block) * state_size();
  }
  bool reset(int64_t row, int64_t step) const { return resets && resets[row * steps + step]; }

  // body(row, head) for every task.
  template <typename F> void for_each_task(F body) const {
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t task = begin; task < end; ++task) body(task / H, task % H);
    });
  }

  // A state in memory (K, V) to or from one with rows of whole vectors.
  void pack(T* to, const T* from) const {
    for (int64_t i = 0; i < K; ++i) std::copy_n(from + i * V, V, to + i * columns);
  }
  void unpack(T* to, const T* from) const {
    for (int64_t i = 0; i < K; ++i) std::copy_n(from + i * columns, V, to + i * V);
  }

  // after = decay * before + weight (K) x row (V); with READ, read (V) = the sum over K of by * row of `after`.
  template <bool READ>
  void write(
      T* after, const T* before, T decay, const T* weight, const T* row, T* read = nullptr,
      const T* by = nullptr) const {
    in_tiles<4>(vectors, [=, this](int64_t first, auto count) {
      const int64_t from = first * W;
      Vec<T> added[count.value], sums[count.value] = {};
      for (int j = 0; j < count.value; ++j) added[j] = load(row + from + j * W);
      for (int64_t i = 0; i < K; ++i)
        for (int j = 0; j < count.value; ++j) {
          const int64_t at = i * columns + from + j * W;
          const Vec<T> C = decay * load(before + at) + weight[i] * added[j];
          store(after + at, C);
          if constexpr (READ) sums[j] += by[i] * C;
        }
      if constexpr (READ)
        for (int j = 0; j < count.value; ++j) store(read + from + j * W, sums[j]);
    });
  }

  // What the step at `place` adds to the state C before it: `error` is the value without what the decayed state holds
  // for the key, `written` is beta times it.
  void compare(const T* C, T decay, T* error, T* written, int64_t place) const {
    product<false>(error, columns, 1, vectors, K, k + place * K, 0, 1, C, columns);
    for (int64_t j = 0; j < columns; j += W) {
      const Vec<T> missing = load(v + place * V + j, V - j) - decay * load(error + j);
      store(error + j, missing);
      store(written + j, beta[place] * missing);
    }
  }
};

template <typename T> void forward(const Problem<T>& p, const T* initial, T* h, T* last, T* kept) {
  p.for_each_task([&](int64_t row, int64_t head) {
    Scratch<T> memory(p.state_size() + 3 * p.columns);
    T *const C = memory.take(p.state_size()), *const error = memory.take(p.columns);
    T *const written = memory.take(p.columns), *const answer = memory.take(p.columns);
    const int64_t first = (row * p.H + head) * p.K * p.V;
    p.pack(C, initial + first);
    for (int64_t t = 0; t < p.steps; ++t) {
      const int64_t place = p.at(row, t, head);
      if (p.reset(row, t)) std::fill_n(C, p.state_size(), T(0));
      if (kept && t % kBlock == 0) std::copy_n(C, p.state_size(), kept + p.kept_at(row, head, t / kBlock));
      const T decay = std::exp(p.log_decay[place]);
      p.compare(C, decay, error, written, place);
      p.template write<true>(C, C, decay, p.k + place * p.K, written, answer, p.q + place * p.K);
      for (int64_t j = 0; j < p.V; ++j) h[place * p.V + j] = p.scale * answer[j];
    }
    p.unpack(last + first, C);
  });
}

// Where the gradients go, in the shapes of the inputs.
template <typename T> struct Gradients {
  T *q, *k, *v, *log_decay, *beta, *initial;
};

template <typename T>
void backward(const Problem<T>& p, const T* kept, const T* dh, const T* dlast, const Gradients<T>& out) {
  constexpr int64_t W = Simd<T>::width;
  p.for_each_task([&](int64_t row, int64_t head) {
    const int64_t size = p.state_size();
    Scratch<T> memory((kBlock + 2) * size + (kBlock + 4) * p.columns);
    T *const dC = memory.take(size);
    T *const states = memory.take((kBlock + 1) * size), *const errors = memory.take(kBlock * p.columns);
    T *const written = memory.take(p.columns), *const dwritten = memory.take(p.columns);
    T *const answer = memory.take(p.columns), *const taken = memory.take(p.columns);
    const int64_t first = (row * p.H + head) * p.K * p.V;
    if (dlast) p.pack(dC, dlast + first);
    for (int64_t block = p.blocks - 1; block >= 0; --block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, p.steps);
      std::copy_n(kept + p.kept_at(row, head, block), size, states);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t place = p.at(row, t, head);
        T* const before = states + (t - begin) * size;
        if (p.reset(row, t)) std::fill_n(before, size, T(0));
        const T decay = std::exp(p.log_decay[place]);
        p.compare(before, decay, errors + (t - begin) * p.columns, written, place);
        p.template write<false>(before + size, before, decay, p.k + place * p.K, written);
      }
      for (int64_t t = end - 1; t >= begin; --t) {
        const int64_t place = p.at(row, t, head);
        const T *const before = states + (t - begin) * size, *const error = errors + (t - begin) * p.columns;
        const T *const q = p.q + place * p.K, *const k = p.k + place * p.K;
        const T decay = std::exp(p.log_decay[place]), beta = p.beta[place];
        for (int64_t j = 0; j < p.columns; j += W)
          store(answer + j, p.scale * load(dh + place * p.V + j, p.V - j));
        p.template write<true>(dC, dC, T(1), q, answer, dwritten, k);  // now of the state after this step
        Vec<T> of_beta{}, of_query{}, of_decay{};
        for (int64_t j = 0; j < p.columns; j += W) {
          const Vec<T> dw = load(dwritten + j), missing = load(error + j);
          of_beta += dw * missing;
          of_query += load(answer + j) * (beta * missing);
          store(written + j, beta * missing);
          store(taken + j, -(decay * beta) * dw);
          store(out.v + place * p.V + j, beta * dw, p.V - j);
        }
        out.beta[place] = total<T>(of_beta);
        const T through_key = total<T>(of_query);
        for (int64_t i = 0; i < p.K; ++i) {
          Vec<T> dq{}, dk{}, ddecay{};
          for (int64_t j = 0; j < p.columns; j += W) {
            T* const gradient = dC + i * p.columns + j;
            const Vec<T> C = load(before + i * p.columns + j), dw = load(taken + j), after = load(gradient);
            dq += C * load(answer + j);
            dk += after * load(written + j) + C * dw;
            const Vec<T> earlier = decay * after + k[i] * dw;
            ddecay += earlier * C;
            store(gradient, earlier);
          }
          out.q[place * p.K + i] = decay * total<T>(dq) + k[i] * through_key;
          out.k[place * p.K + i] = total<T>(dk);
          of_decay += ddecay;
        }
        out.log_decay[place] = total<T>(of_decay);
        if (p.reset(row, t)) std::fill_n(dC, size, T(0));
      }
    }
    p.unpack(out.initial + first, dC);
  });
}

// Exported models call these two with sources of their own, written by any version: keep what is given and returned.

// -> h (B, T, H, V) and the last state (B, H, K, V) in the type of the first, in which all is computed; the states every
// kBlock steps, or empty unless `save`.
std::tuple<Tensor, Tensor, Tensor> gated_delta_forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_decay_, const Tensor& beta_,
    const OptionalTensor& resets_, const Tensor& C_, bool save) {
  const auto type = C_.scalar_type();
  auto dense = [&](const Tensor& x) { return x.to(type).contiguous(); };
  const Tensor q = dense(q_), k = dense(k_), v = dense(v_), log_decay = dense(log_decay_), beta = dense(beta_);
  const Tensor C = C_.contiguous();
  const OptionalTensor resets = resets_ ? OptionalTensor(resets_->contiguous()) : resets_;
  return by_dtype(C, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(q, k, v, log_decay, beta, resets);
    const Tensor h = at::empty(v.sizes(), C.options()), last = at::empty(C.sizes(), C.options());
    const Tensor kept = at::empty({save ? p.B : 0, p.H, p.blocks, p.state_size()}, C.options());
    forward<T>(
        p, C.const_data_ptr<T>(), h.data_ptr<T>(), last.data_ptr<T>(), save ? kept.data_ptr<T>() : nullptr);
    return std::make_tuple(h, last, kept);
  });
}

// -> gradients of q, k, v, log_decay, beta and the first state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_backward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_decay_, const Tensor& beta_,
    const OptionalTensor& resets_, const Tensor& kept, const Tensor& dh_, const OptionalTensor& dlast_) {
  const auto type = kept.scalar_type();
  auto dense = [&](const Tensor& x) { return x.to(type).contiguous(); };
  const Tensor q = dense(q_), k = dense(k_), v = dense(v_), log_decay = dense(log_decay_), beta = dense(beta_);
  const Tensor dh = dense(dh_);
  const OptionalTensor dlast = dlast_ ? OptionalTensor(dense(*dlast_)) : dlast_;
  const OptionalTensor resets = resets_ ? OptionalTensor(resets_->contiguous()) : resets_;
  return by_dtype(kept, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(q, k, v, log_decay, beta, resets);
    auto like = [&](const Tensor& x) { return at::empty(x.sizes(), kept.options()); };
    const Tensor dq = like(q), dk = like(k), dv = like(v), ddecay = like(log_decay), dbeta = like(beta);
    const Tensor dC = at::empty({p.B, p.H, p.K, p.V}, kept.options());
    backward<T>(
        p, kept.const_data_ptr<T>(), dh.const_data_ptr<T>(),
        dlast ? dlast->const_data_ptr<T>() : nullptr,
        {dq.data_ptr<T>(), dk.data_ptr<T>(), dv.data_ptr<T>(), ddecay.data_ptr<T>(), dbeta.data_ptr<T>(),
         dC.data_ptr<T>()});
    return std::make_tuple(
        dq.to(q_.scalar_type()), dk.to(k_.scalar_type()), dv.to(v_.scalar_type()),
        ddecay.to(log_decay_.scalar_type()), dbeta.to(beta_.scalar_type()), dC);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xlstm_lm, library) {
  library.def(
      "gated_delta_forward(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? resets, Tensor C,"
      " bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "gated_delta_backward(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? resets, Tensor kept,"
      " Tensor dh, Tensor? dlast) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xlstm_lm, CPU, library) {
  library.impl("gated_delta_forward", &gated_delta_forward);
  library.impl("gated_delta_backward", &gated_delta_backward);
}
