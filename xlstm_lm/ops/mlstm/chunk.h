// How a row is cut into chunks, and what the gates of a chunk amount to.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../simd.h"

namespace {

constexpr int64_t kSpan = 4;  // longest chunks a span: the forward pass keeps the state before each span

// Steps start, ..., start + length - 1. A reset begins a new chunk, so that no chunk holds steps of two documents;
// `empty` says that the state before it is. A span of a row holds the chunks that start in kSpan * longest steps.
//
// How much is kept does not depend on the resets: a chunk with a state before it follows `longest` steps of the same
// document, so at most one starts in `longest` steps, and at most kSpan in a span.
struct Chunk {
  int64_t start, length;
  int64_t m;              // place of the m before it among those of its row
  int64_t span;           // number of its span in the row
  int64_t first_of_span;  // number of that span's first chunk
  int64_t state;          // chunks before it in the span that have a state before them
  bool empty;
};

// The places for m in a row, and its spans.
inline int64_t places(int64_t steps, int64_t longest) { return (steps + longest - 1) / longest; }
inline int64_t spans(int64_t steps, int64_t longest) { return places(steps, kSpan * longest); }

inline std::vector<Chunk> cut_row(
    const bool* resets, int64_t steps, int64_t longest, bool has_initial_state) {
  std::vector<Chunk> out;
  for (int64_t start = 0; start < steps; start += out.back().length) {
    const int64_t end = std::min(start + longest, steps);
    const int64_t next = resets ? std::find(resets + start + 1, resets + end, true) - resets : end;
    const bool empty = (resets && resets[start]) || (start == 0 && !has_initial_state);
    const int64_t number = out.size(), span = start / (kSpan * longest);
    const bool opens = out.empty() || out.back().span != span;
    const int64_t first_of_span = opens ? number : out.back().first_of_span;
    const int64_t state = opens ? 0 : out.back().state + !out.back().empty;
    out.push_back({start, next - start, start / longest, span, first_of_span, state, empty});
  }
  return out;
}

// e^x, infinite where it overflows.
template <typename T> inline Vec<T> unbounded_exponential(Vec<T> x) {
  const T highest = sizeof(T) == 4 ? T(88) : T(709.7);
  return x > highest ? splat(std::numeric_limits<T>::infinity()) : exponential(x);
}

template <typename T> inline Vec<T> log_sigmoid(Vec<T> x) {
  return (x < T(0) ? x : Vec<T>{}) - log_one_plus(exponential(x < T(0) ? x : -x));
}

// e^(c - x), which is at most 1 wherever a step is seen.
template <typename T> inline Vec<T> weight(Vec<T> c, T x) {
  const Vec<T> exponent = c - x;
  return exponential(exponent > T(0) ? Vec<T>{} : exponent);
}

// Within a chunk let b be the running sum of the log forget gates and c = log input gate - b. At step t step s weighs
// exp(c_s - x_t), with x the running maximum of c that starts at the m before the chunk; m_t = b_t + x_t is the
// recurrent stabilizer. The sigmoid input gate needs no stabilizer: m = 0, x = -b.
template <typename T> struct Gates {
  T *forget, *input;  // before their activation
  T *c, *x, *m;
  T *query, *key;  // weight of the state before the chunk at each step; of each step in the state after it
  T decay;         // weight of the state before the chunk in the one after it

  static int64_t scratch(int64_t longest) { return 7 * longest; }
  Gates(Scratch<T>& memory, int64_t longest) {
    for (T** part : {&forget, &input, &c, &x, &m, &query, &key}) *part = memory.take(longest);
  }

  // Makes all else from `forget` and `input`.
  void prepare(const Chunk& chunk, T m_before, bool sigmoid_gate) {
    constexpr int W = Simd<T>::width;
    const T lowest = std::numeric_limits<T>::lowest(), infinity = std::numeric_limits<T>::infinity();
    for (int64_t t = 0; t < chunk.length; t += W) {
      store(x + t, log_sigmoid<T>(load(forget + t)));
      store(c + t, sigmoid_gate ? log_sigmoid<T>(load(input + t)) : load(input + t));
    }
    if (chunk.empty) x[0] = T(0);  // there is nothing to forget
    double b = 0.0, highest = std::max(m_before, lowest);  // their sum may be small where they are not
    for (int64_t t = 0; t < chunk.length; ++t) {
      b += x[t];
      const double difference = c[t] - b;
      highest = std::max(highest, difference);
      c[t] = T(difference);
      x[t] = T(sigmoid_gate ? -b : highest);
      m[t] = sigmoid_gate ? T(0) : T(std::max(b + highest, double(lowest)));
    }
    for (int64_t t = chunk.length; t % W; ++t) c[t] = -infinity;
    const T last = x[chunk.length - 1];
    for (int64_t t = 0; t < chunk.length; t += W) {
      store(query + t, exponential(m_before - load(x + t)));
      store(key + t, weight<T>(load(c + t), last));
    }
    decay = query[chunk.length - 1];
  }

  // The weights of a vector of steps from `first` on at step t; the steps after t have none.
  Vec<T> weights(int64_t t, int64_t first) const {
    using integer = typename Simd<T>::integer;
    typename Simd<T>::ivec lane;
    for (int j = 0; j < Simd<T>::width; ++j) lane[j] = integer(j);
    return lane <= integer(t - first) ? weight<T>(load(c + first), x[t]) : Vec<T>{};
  }
};

}  // namespace
