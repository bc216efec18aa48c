// The mLSTM on a CPU: chunk by chunk through time, one head of one row a task, all of a chunk in the cache.
//
// Inside a chunk each step sees the earlier ones through a triangle of weights, as in attention, of which only the
// blocks on and below the diagonal are computed; older steps are seen through the state. (Chunkwise form: arXiv
// 2503.14376.) The forward pass keeps the normalizer of each step, m before each chunk, and the state before each
// span of chunks. The backward pass makes the states of a span again and takes its chunks from the last to the first.
//
// Tiles are copied to scratch memory with rows of whole vectors; what lies beyond the true sizes is zero there. q is
// scaled by 1 / sqrt(K) on the way in, its gradient on the way out.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../by_dtype.h"
#include "../simd.h"
#include "chunk.h"
#include "problem.h"

namespace {

template <typename T> T dot(const T* a, const T* b, int64_t size) {
  Vec<T> sum{};
  for (int64_t j = 0; j < size; j += Simd<T>::width) sum += load(a + j) * load(b + j);
  return total<T>(sum);
}

// n = decay * n + the sum of weight * x over its rows
template <typename T> void add_rows(T* n, T decay, const T* x, const T* weight, int64_t rows, int64_t row) {
  for (int64_t j = 0; j < row; j += Simd<T>::width) {
    Vec<T> sum = decay * load(n + j);
    for (int64_t r = 0; r < rows; ++r) sum += weight[r] * load(x + r * row + j);
    store(n + j, sum);
  }
}

// The inverse denominator of h from d and m at each step; without normalization, the way back to true units.
template <typename T>
void invert_normalizer(T* inverse, const T* d, const T* m, int64_t length, const Options& options) {
  for (int64_t t = 0; t < length; t += Simd<T>::width) {
    const Vec<T> d_ = load(d + t), m_ = load(m + t), size = d_ < T(0) ? -d_ : d_;
    const Vec<T> bound = unbounded_exponential<T>(options.normalize ? -m_ : m_);
    store(inverse + t, options.normalize ? T(1) / ((size > bound ? size : bound) + T(options.eps)) : bound);
  }
}

// What the forward pass keeps: d of each step (B, H, T), m before each chunk (B, H, places), C and n before each span
// (B, H, spans, state size).
template <typename T> struct Kept {
  T *d, *m, *states;
};
template <typename T> struct State {
  T *C, *n, *m;
};

template <typename T>
void forward(
    const Problem<T>& p, const State<T>& initial, const Strided<T>& h_out, const State<T>& final_state,
    const Kept<T>& kept) {
  constexpr int64_t W = Simd<T>::width;
  const int64_t L = p.longest, kp = p.kp, vp = p.vp;
  const int64_t scratch = 4 * L * kp + 2 * L * vp + L * L + p.state_size() + 2 * L;
  p.for_each_task(scratch + Gates<T>::scratch(L), [&](Scratch<T>& memory, int64_t b, int64_t h) {
    T *q = memory.take(L * kp), *weighed_q = memory.take(L * kp);
    T *k = memory.take(L * kp), *k_transposed = memory.take(kp * L);
    T *v = memory.take(L * vp), *num = memory.take(L * vp), *weights = memory.take(L * L);
    T *d = memory.take(L), *inverse = memory.take(L);
    T *C = memory.take(p.state_size()), *n = C + kp * vp;
    Gates<T> gates(memory, L);
    Ahead ahead;
    T m = p.empty_m();
    if (initial.C) {
      copy_in(C, vp, initial.C + p.C_at(b, h), p.V, p.K, p.V);
      copy_in(n, kp, initial.n + p.n_at(b, h), p.K, 1, p.K);
      m = initial.m[b * p.H + h];
    }
    const std::vector<Chunk>& chunks = p.rows[b];
    for (std::size_t number = 0; number < chunks.size(); ++number) {
      const Chunk& chunk = chunks[number];
      const int64_t length = chunk.length;
      if (chunk.empty) m = p.empty_m();
      if (kept.d && !chunk.empty) {
        kept.m[p.m_at(chunk, b, h)] = m;
        if (int64_t(number) == chunk.first_of_span)
          std::copy_n(C, p.state_size(), kept.states + p.state_at(chunk, b, h));
      }
      p.load_gates(gates, chunk, m, b, h);
      ahead.clear();
      ahead.add(h_out, b, h, chunk, p.V, true);
      if (number + 1 < chunks.size()) p.add_inputs(ahead, chunks[number + 1], b, h);
      copy_in(q, kp, p.q.at(b, chunk.start, h), p.q.step, length, p.K, p.scale);
      copy_in(k, kp, p.k.at(b, chunk.start, h), p.k.step, length, p.K);
      copy_in(v, vp, p.v.at(b, chunk.start, h), p.v.step, length, p.V);
      std::fill(k + length * kp, k + p.padded(length) * kp, T(0));
      transpose(k_transposed, L, k, kp, p.padded(length), kp);
      if (!chunk.empty) weigh_rows(weighed_q, q, gates.query, length, kp);

      for (int64_t first = 0; first < length; first += W) {
        const int64_t count = std::min(W, length - first);
        product<false>(weights + first * L, L, count, first / W + 1, p.K, q + first * kp, kp, 1, k_transposed, L);
        for (int64_t t = first; t < first + count; ++t) {
          ahead.fetch(6);
          Vec<T> sum{};
          for (int64_t s = 0; s <= first; s += W) {
            T* at = weights + t * L + s;
            const Vec<T> weight = load(at) * gates.weights(t, s);
            store(at, weight);
            sum += weight;
          }
          if (!chunk.empty)
            for (int64_t j = 0; j < kp; j += W) sum += load(weighed_q + t * kp + j) * load(n + j);
          d[t] = total<T>(sum);
        }
        product<false>(num + first * vp, vp, count, vp / W, first + count, weights + first * L, L, 1, v, vp);
      }
      if (!chunk.empty) product<true>(num, vp, length, vp / W, p.K, weighed_q, kp, 1, C, vp);
      invert_normalizer(inverse, d, gates.m, length, p.options);
      if (kept.d) std::copy_n(d, length, kept.d + (b * p.H + h) * p.steps + chunk.start);
      for (int64_t t = 0; t < length; ++t)
        copy_out(h_out.at(b, chunk.start + t, h), 0, num + t * vp, 0, 1, p.V, inverse[t]);

      m = gates.m[length - 1];
      const bool last = number + 1 == chunks.size();
      if (last ? !final_state.C : chunks[number + 1].empty) continue;  // nobody reads the state after this chunk
      const T decay = chunk.empty ? T(0) : gates.decay;
      if (chunk.empty) std::fill_n(C, p.state_size(), T(0));
      add_rows(n, decay, k, gates.key, length, kp);
      weigh_rows(k, k, gates.key, length, kp);
      product<true>(C, vp, p.K, vp / W, length, k, 1, kp, v, vp, decay);
    }
    if (final_state.C) {
      copy_out(final_state.C + p.C_at(b, h), p.V, C, vp, p.K, p.V);
      copy_out(final_state.n + p.n_at(b, h), p.K, n, kp, 1, p.K);
      final_state.m[b * p.H + h] = m;
    }
  });
}

template <typename T> struct Gradients {
  Strided<T> q, k, v, i, f;
  T *C, *n;  // of the initial state
};

template <typename T>
void backward(
    const Problem<T>& p, const Strided<T>& h_in, const Strided<T>& dh_in, const State<T>& final_state,
    const State<T>& final_gradient, const Kept<T>& kept, const Gradients<T>& out) {
  constexpr int64_t W = Simd<T>::width;
  const int64_t L = p.longest, kp = p.kp, vp = p.vp, state_size = p.state_size();
  const int64_t scratch = 7 * L * kp + 3 * L * vp + 2 * L * L + (kSpan + 2) * state_size + 4 * L;
  p.for_each_task(scratch + Gates<T>::scratch(L), [&](Scratch<T>& memory, int64_t b, int64_t h) {
    T *q = memory.take(L * kp), *weighed_q = memory.take(L * kp), *dq = memory.take(L * kp);
    T *k = memory.take(L * kp), *weighed_k = memory.take(L * kp), *dk = memory.take(L * kp);
    T *k_transposed = memory.take(kp * L), *v_transposed = memory.take(vp * L);
    T *dnum = memory.take(L * vp), *v = memory.take(L * vp), *dv = v;  // v is not needed any more when dv is made
    T *weights = memory.take(L * L), *dscores = memory.take(L * L);
    T *inverse = memory.take(L), *dd = memory.take(L), *di = memory.take(L), *df = memory.take(L);
    T* states = memory.take(kSpan * state_size);  // C transposed, and n, before each chunk of a span
    T *dC = memory.take(state_size), *dn = dC + kp * vp, *dC_transposed = memory.take(kp * vp);
    Gates<T> gates(memory, L);
    Ahead ahead;

    double later = 0.0;  // the sum over later steps of q.dq - k.dk, and what the returned state adds
    bool has_later = final_gradient.C;
    if (has_later) {
      copy_in(dC, vp, final_gradient.C + p.C_at(b, h), p.V, p.K, p.V);
      copy_in(dn, kp, final_gradient.n + p.n_at(b, h), p.K, 1, p.K);
      transpose(dC_transposed, kp, dC, vp, kp, vp);
      for (int64_t j = 0; j < p.K * p.V; ++j)
        later += double(final_state.C[p.C_at(b, h) + j]) * final_gradient.C[p.C_at(b, h) + j];
      for (int64_t j = 0; j < p.K; ++j)
        later += double(final_state.n[p.n_at(b, h) + j]) * final_gradient.n[p.n_at(b, h) + j];
    }
    auto load_chunk = [&](const Chunk& chunk) {
      p.load_gates(gates, chunk, chunk.empty ? p.empty_m() : kept.m[p.m_at(chunk, b, h)], b, h);
      copy_in(k, kp, p.k.at(b, chunk.start, h), p.k.step, chunk.length, p.K);
      copy_in(v, vp, p.v.at(b, chunk.start, h), p.v.step, chunk.length, p.V);
    };

    const std::vector<Chunk>& chunks = p.rows[b];
    for (int64_t number = chunks.size() - 1; number >= 0; --number) {
      const Chunk& chunk = chunks[number];
      const int64_t length = chunk.length;
      if (number + 1 == int64_t(chunks.size()) || chunks[number + 1].span != chunk.span) {
        for (int64_t each = chunk.first_of_span; each <= number; ++each) {
          if (chunks[each].empty) continue;
          T* state = states + chunks[each].state * state_size;
          if (each == chunk.first_of_span) {
            const T* from = kept.states + p.state_at(chunk, b, h);
            transpose(state, kp, from, vp, kp, vp);
            std::copy_n(from + kp * vp, kp, state + kp * vp);
            continue;
          }
          const Chunk& before = chunks[each - 1];
          load_chunk(before);
          if (before.empty) std::fill_n(state, state_size, T(0));
          else std::copy_n(state - state_size, state_size, state);
          const T decay = before.empty ? T(0) : gates.decay;
          add_rows(state + kp * vp, decay, k, gates.key, before.length, kp);
          weigh_rows(k, k, gates.key, before.length, kp);
          product<true>(state, kp, p.V, kp / W, before.length, v, 1, vp, k, kp, decay);
        }
      }
      const T *C_transposed = states + chunk.state * state_size, *n = C_transposed + kp * vp;  // unless it is empty

      ahead.clear();
      for (const Strided<T>* x : {&out.q, &out.k}) ahead.add(*x, b, h, chunk, p.K, true);
      ahead.add(out.v, b, h, chunk, p.V, true);
      if (number > 0) {
        const Chunk& next = chunks[number - 1];
        for (const Strided<T>* x : {&h_in, &dh_in}) ahead.add(*x, b, h, next, p.V, false);
        p.add_inputs(ahead, next, b, h);
      }
      load_chunk(chunk);
      copy_in(q, kp, p.q.at(b, chunk.start, h), p.q.step, length, p.K, p.scale);
      std::fill(k + length * kp, k + p.padded(length) * kp, T(0));
      std::fill(v + length * vp, v + p.padded(length) * vp, T(0));
      transpose(k_transposed, L, k, kp, p.padded(length), kp);
      transpose(v_transposed, L, v, vp, p.padded(length), vp);
      if (!chunk.empty) weigh_rows(weighed_q, q, gates.query, length, kp);
      if (has_later) weigh_rows(weighed_k, k, gates.key, length, kp);

      const T* d = kept.d + (b * p.H + h) * p.steps + chunk.start;
      invert_normalizer(inverse, d, gates.m, length, p.options);
      for (int64_t t = 0; t < length; ++t) {
        const T *dh = dh_in.at(b, chunk.start + t, h), *h_ = h_in.at(b, chunk.start + t, h);
        Vec<T> sum{};
        for (int64_t j = 0; j < vp; j += W) {
          const Vec<T> gradient = load(dh + j, p.V - j);
          sum += gradient * load(h_ + j, p.V - j);
          store(dnum + t * vp + j, inverse[t] * gradient);
        }
        dd[t] = total<T>(sum);
      }
      for (int64_t t = 0; t < length; t += W) {
        const Vec<T> d_ = load(d + t, length - t), bound = unbounded_exponential<T>(-load(gates.m + t));
        const Vec<T> size = p.options.normalize ? -load(dd + t) * load(inverse + t) : Vec<T>{};
        store(dd + t, d_ > bound ? size : -d_ > bound ? -size : Vec<T>{});
      }

      for (int64_t first = 0; first < length; first += W) {
        const int64_t count = std::min(W, length - first);
        product<false>(weights + first * L, L, count, first / W + 1, p.K, q + first * kp, kp, 1, k_transposed, L);
        product<false>(dscores + first * L, L, count, first / W + 1, p.V, dnum + first * vp, vp, 1, v_transposed, L);
        for (int64_t t = first; t < first + count; ++t) {
          ahead.fetch(10);
          for (int64_t s = 0; s <= first; s += W) {
            const Vec<T> weight = gates.weights(t, s);
            T *score = weights + t * L + s, *dscore = dscores + t * L + s;
            store(score, load(score) * weight);
            store(dscore, (load(dscore) + dd[t]) * weight);
          }
        }
      }

      // Through the states, as far as there are any, then within the chunk.
      if (!chunk.empty) {
        product<false>(dq, kp, length, kp / W, p.V, dnum, vp, 1, C_transposed, kp);
        for (int64_t t = 0; t < length; ++t)
          for (int64_t j = 0; j < kp; j += W) {
            T* at = dq + t * kp + j;
            store(at, gates.query[t] * (load(at) + dd[t] * load(n + j)));
          }
      } else std::fill_n(dq, length * kp, T(0));
      if (has_later) {
        product<false>(dv, vp, length, vp / W, p.K, weighed_k, kp, 1, dC, vp);
        product<false>(dk, kp, length, kp / W, p.V, v_transposed, 1, L, dC_transposed, kp);
        for (int64_t s = 0; s < length; ++s)
          for (int64_t j = 0; j < kp; j += W) {
            T* at = dk + s * kp + j;
            store(at, gates.key[s] * (load(at) + load(dn + j)));
          }
      } else {
        std::fill_n(dv, length * vp, T(0));
        std::fill_n(dk, length * kp, T(0));
      }
      for (int64_t first = 0; first < length; first += W) {
        const int64_t count = std::min(W, length - first), rest = length - first, diagonal = first * L + first;
        product<true>(dq + first * kp, kp, count, kp / W, first + count, dscores + first * L, L, 1, k, kp);
        product<true>(dk + first * kp, kp, count, kp / W, rest, dscores + diagonal, 1, L, q + first * kp, kp);
        product<true>(dv + first * vp, vp, count, vp / W, rest, weights + diagonal, 1, L, dnum + first * vp, vp);
      }

      for (int64_t t = 0; t < length; ++t) {
        di[t] = dot(k + t * kp, dk + t * kp, kp);
        df[t] = dot(q + t * kp, dq + t * kp, kp) - di[t];
        copy_out(out.q.at(b, chunk.start + t, h), 0, dq + t * kp, 0, 1, p.K, p.scale);
      }
      copy_out(out.k.at(b, chunk.start, h), out.k.step, dk, kp, length, p.K);
      copy_out(out.v.at(b, chunk.start, h), out.v.step, dv, vp, length, p.V);
      for (int64_t t = length - 1; t >= 0; --t) df[t] = T(later += df[t]);
      if (chunk.empty) df[0] = T(0);
      for (int64_t t = 0; t < length; t += W) {  // times sigmoid(-gate)
        store(df + t, load(df + t) / (T(1) + unbounded_exponential<T>(load(gates.forget + t))));
        if (p.options.sigmoid_gate)
          store(di + t, load(di + t) / (T(1) + unbounded_exponential<T>(load(gates.input + t))));
      }
      for (int64_t t = 0; t < length; ++t) {
        *out.i.at(b, chunk.start + t, h) = di[t];
        *out.f.at(b, chunk.start + t, h) = df[t];
      }

      if (chunk.empty) {
        std::fill_n(dC, state_size, T(0));
        later = 0.0;
      } else {
        product<true>(dC, vp, p.K, vp / W, length, weighed_q, 1, kp, dnum, vp, gates.decay);
        add_rows(dn, gates.decay, weighed_q, dd, length, kp);
        transpose(dC_transposed, kp, dC, vp, kp, vp);
      }
      has_later = !chunk.empty;
    }
    copy_out(out.C + p.C_at(b, h), p.V, dC, vp, p.K, p.V);
    copy_out(out.n + p.n_at(b, h), p.K, dn, kp, 1, p.K);
  });
}

template <typename T> T* pointer(const OptionalTensor& x) { return x ? x->data_ptr<T>() : nullptr; }

OptionalTensor dense(const OptionalTensor& x, at::ScalarType type) {
  return x ? OptionalTensor(x->to(type).contiguous()) : x;
}

// -> h (B, T, H, V); C, n, m of the state after the last step, or empty unless `return_state`; and, or empty unless
// `save`, what the backward pass needs besides the inputs and h: d, m, states.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f, const OptionalTensor& resets,
    const OptionalTensor& C, const OptionalTensor& n, const OptionalTensor& m, bool return_state, bool save,
    bool sigmoid_gate, bool normalize, double eps, int64_t chunk_length) {
  const auto type = compute_type(q);
  const Tensor q_ = readable(q, type), k_ = readable(k, type), v_ = readable(v, type);
  const OptionalTensor C_ = dense(C, type), n_ = dense(n, type), m_ = dense(m, type);
  const OptionalTensor resets_ = dense(resets, at::kBool);
  return by_dtype(q_, [&](auto zero) {
    using T = decltype(zero);
    const Tensor i_ = i.to(type), f_ = f.to(type);
    const Problem<T> p(q_, k_, v_, i_, f_, resets_, C.has_value(), chunk_length, {sigmoid_gate, normalize, eps});
    auto empty = [&](at::IntArrayRef sizes, bool needed) {
      return at::empty(needed ? sizes : at::IntArrayRef(0), q_.options());
    };
    const Tensor h = empty({p.B, p.steps, p.H, p.V}, true);
    const Tensor C_last = empty({p.B, p.H, p.K, p.V}, return_state);
    const Tensor n_last = empty({p.B, p.H, p.K}, return_state), m_last = empty({p.B, p.H}, return_state);
    const Tensor d = empty({p.B, p.H, p.steps}, save);
    // Empty chunks leave gaps in these.
    const Tensor m_kept = empty({p.B, p.H, p.places}, save).zero_();
    const Tensor states = empty({p.B, p.H, p.spans, p.state_size()}, save).zero_();
    State<T> last{nullptr, nullptr, nullptr};
    if (return_state) last = {pointer<T>(C_last), pointer<T>(n_last), pointer<T>(m_last)};
    Kept<T> kept{nullptr, nullptr, nullptr};
    if (save) kept = {pointer<T>(d), pointer<T>(m_kept), pointer<T>(states)};
    forward<T>(p, {pointer<T>(C_), pointer<T>(n_), pointer<T>(m_)}, h, last, kept);
    return std::make_tuple(h.to(v.scalar_type()), C_last, n_last, m_last, d, m_kept, states);
  });
}

// -> gradients of q, k, v, i, f, and of C and n of the initial state, or empty where there was none. d, m, states: as
// kept; C_last, n_last: the returned state, dC_last and dn_last its gradients, where it has any.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f, const OptionalTensor& resets,
    const Tensor& h, const Tensor& dh, const Tensor& d, const Tensor& m, const Tensor& states,
    const OptionalTensor& C_last, const OptionalTensor& n_last, const OptionalTensor& dC_last,
    const OptionalTensor& dn_last, bool has_initial_state, bool sigmoid_gate, bool normalize, double eps,
    int64_t chunk_length) {
  const auto type = compute_type(q);
  const Tensor q_ = readable(q, type), k_ = readable(k, type), v_ = readable(v, type);
  const Tensor h_ = readable(h, type), dh_ = readable(dh, type);
  const OptionalTensor dC = dense(dC_last, type), dn = dense(dn_last, type), resets_ = dense(resets, at::kBool);
  return by_dtype(q_, [&](auto zero) {
    using T = decltype(zero);
    const Tensor i_ = i.to(type), f_ = f.to(type);
    const Problem<T> p(q_, k_, v_, i_, f_, resets_, has_initial_state, chunk_length, {sigmoid_gate, normalize, eps});
    auto like = [&](const Tensor& x) { return at::empty(x.sizes(), q_.options()); };
    const Tensor dq = like(q), dk = like(k), dv = like(v), di = like(i), df = like(f);
    const Tensor dC_first = at::empty({p.B, p.H, p.K, p.V}, q_.options());
    const Tensor dn_first = at::empty({p.B, p.H, p.K}, q_.options());
    backward<T>(
        p, h_, dh_, {pointer<T>(C_last), pointer<T>(n_last), nullptr}, {pointer<T>(dC), pointer<T>(dn), nullptr},
        {pointer<T>(d), pointer<T>(m), pointer<T>(states)},
        {dq, dk, dv, di, df, pointer<T>(dC_first), pointer<T>(dn_first)});
    auto in_type_of = [](const Tensor& x, const Tensor& gradient) { return gradient.to(x.scalar_type()); };
    auto if_initial = [&](const Tensor& x) { return has_initial_state ? x : at::empty({0}, q_.options()); };
    return std::make_tuple(
        in_type_of(q, dq), in_type_of(k, dk), in_type_of(v, dv), in_type_of(i, di), in_type_of(f, df),
        if_initial(dC_first), if_initial(dn_first));
  });
}

int64_t simd_bytes() { return kVectorBytes; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(xlstm_lm, library) {
  library.def("simd_bytes() -> int", &simd_bytes);
  library.def(
      "mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? resets, Tensor? C, Tensor? n, Tensor? m,"
      " bool return_state, bool save, bool sigmoid_gate, bool normalize, float eps, int chunk_length)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "mlstm_backward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? resets, Tensor h, Tensor dh, Tensor d,"
      " Tensor m, Tensor states, Tensor? C_last, Tensor? n_last, Tensor? dC_last, Tensor? dn_last,"
      " bool has_initial_state, bool sigmoid_gate, bool normalize, float eps, int chunk_length)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xlstm_lm, CPU, library) {
  library.impl("mlstm_forward", &mlstm_forward);
  library.impl("mlstm_backward", &mlstm_backward);
}
