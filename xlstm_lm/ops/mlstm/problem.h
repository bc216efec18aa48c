// What a call computes, how it is shared out, and how its tensors are read into tiles and written from them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../simd.h"
#include "chunk.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T> T* pointer(const Tensor& x) { return x.data_ptr<T>(); }

// Elements (row, step, head) of an input or output of any strides; the last dimension is contiguous.
template <typename T> struct Strided {
  T* data;
  int64_t row, step, head;
  Strided(const Tensor& x) : data(pointer<T>(x)), row(x.stride(0)), step(x.stride(1)), head(x.stride(2)) {}
  T* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * step + h * head; }
};

// Rows of memory that are needed a little later, to be fetched between other work, a few at a time.
class Ahead {
  struct Rows {
    const char* data;
    int64_t row, bytes, left;
    bool write;
  };
  std::vector<Rows> queue_;
  std::size_t first_ = 0;

 public:
  void clear() {
    queue_.clear();
    first_ = 0;
  }
  // The rows of a chunk of x, each of `size` elements.
  template <typename T>
  void add(const Strided<T>& x, int64_t b, int64_t h, const Chunk& chunk, int64_t size, bool write) {
    const int64_t bytes = size * sizeof(T), row = x.step * sizeof(T);
    queue_.push_back({reinterpret_cast<const char*>(x.at(b, chunk.start, h)), row, bytes, chunk.length, write});
  }
  void fetch(int64_t rows) {
    for (; rows > 0 && first_ < queue_.size(); --rows) {
      Rows& next = queue_[first_];
      for (int64_t byte = 0; byte < next.bytes; byte += 64) {
        if (next.write) __builtin_prefetch(next.data + byte, 1);
        else __builtin_prefetch(next.data + byte);
      }
      next.data += next.row;
      if (--next.left == 0) ++first_;
    }
  }
};

struct Options {
  bool sigmoid_gate, normalize;
  double eps;
};

template <typename T> struct Problem {
  static constexpr int64_t W = Simd<T>::width;
  int64_t B, steps, H, K, V, longest, kp, vp;  // kp, vp: K and V in whole vectors
  T scale;
  Options options;
  Strided<T> q, k, v, i, f;
  std::vector<std::vector<Chunk>> rows;
  int64_t places, spans;  // of a row, see chunk.h

  Problem(
      const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& i_, const Tensor& f_,
      const OptionalTensor& resets, bool has_initial_state, int64_t chunk_length, const Options& options_)
      : B(q_.size(0)), steps(q_.size(1)), H(q_.size(2)), K(q_.size(3)), V(v_.size(3)),
        longest(padded(std::min(chunk_length, steps))), kp(padded(K)), vp(padded(V)),
        scale(T(1.0 / std::sqrt(double(K)))), options(options_), q(q_), k(k_), v(v_), i(i_), f(f_),
        places(::places(steps, chunk_length)), spans(::spans(steps, chunk_length)) {
    for (int64_t b = 0; b < B; ++b) {
      const bool* row = resets ? resets->const_data_ptr<bool>() + b * steps : nullptr;
      rows.push_back(cut_row(row, steps, chunk_length, has_initial_state));
    }
  }

  static int64_t padded(int64_t count) { return (count + W - 1) / W * W; }
  T empty_m() const { return options.sigmoid_gate ? T(0) : -std::numeric_limits<T>::infinity(); }
  int64_t state_size() const { return kp * vp + kp; }  // C and n in scratch memory
  int64_t C_at(int64_t b, int64_t h) const { return (b * H + h) * K * V; }
  int64_t n_at(int64_t b, int64_t h) const { return (b * H + h) * K; }

  int64_t m_at(const Chunk& chunk, int64_t b, int64_t h) const { return (b * H + h) * places + chunk.m; }
  int64_t state_at(const Chunk& chunk, int64_t b, int64_t h) const {
    return ((b * H + h) * spans + chunk.span) * state_size();
  }

  template <typename F> void for_each_task(int64_t scratch, F body) const {
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t task = begin; task < end; ++task) {
        Scratch<T> memory(scratch);
        body(memory, task / H, task % H);
      }
    });
  }

  // Lets the inputs of a chunk be fetched early.
  void add_inputs(Ahead& ahead, const Chunk& chunk, int64_t b, int64_t h) const {
    for (const Strided<T>* x : {&i, &f}) ahead.add(*x, b, h, chunk, 1, false);
    for (const Strided<T>* x : {&q, &k}) ahead.add(*x, b, h, chunk, K, false);
    ahead.add(v, b, h, chunk, V, false);
  }

  void load_gates(Gates<T>& gates, const Chunk& chunk, T m_before, int64_t b, int64_t h) const {
    for (int64_t t = 0; t < chunk.length; ++t) {
      gates.forget[t] = *f.at(b, chunk.start + t, h);
      gates.input[t] = *i.at(b, chunk.start + t, h);
    }
    gates.prepare(chunk, m_before, options.sigmoid_gate);
  }
};

// to (rows, whole vectors) = factor * from; the rest of the last vector of a row becomes zero.
template <typename T>
void copy_in(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns, T factor = T(1)) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += Simd<T>::width)
      store(to + r * to_row + j, factor * load(from + r * from_row + j, columns - j));
}

template <typename T>
void copy_out(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns, T factor = T(1)) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += Simd<T>::width)
      store(to + r * to_row + j, factor * load(from + r * from_row + j), columns - j);
}

// to = weight of its row * from
template <typename T> void weigh_rows(T* to, const T* from, const T* weight, int64_t rows, int64_t row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < row; j += Simd<T>::width)
      store(to + r * row + j, weight[r] * load(from + r * row + j));
}

}  // namespace
