// One step of the sLSTM cell on a vector of units.

#pragma once

#include "../simd.h"

namespace {

template <typename T> struct Cell {
  Vec<T> c, n, m;
};

// What the gates of a step are, and what the backward pass can make of them.
template <typename T> struct Step {
  Vec<T> input, forget, squashed, y, per_normalizer, forget_odds, output_odds, c_before, n_before;
};

// One step of the cell. Of exp(i - m) and exp(logsigmoid(f) + m' - m) one is always 1. From an empty state, m' = -inf,
// the other is exactly 0.
template <typename T> inline Step<T> advance(Cell<T>& cell, const Vec<T> gates[4]) {
  const Vec<T> f = gates[1];
  Step<T> step;
  step.forget_odds = exponential(f < T(0) ? f : -f);  // e^-|f|
  const Vec<T> decayed = (f < T(0) ? f : Vec<T>{}) - log_one_plus(step.forget_odds) + cell.m;
  const Vec<T> lead = gates[0] - decayed;
  const auto input_leads = lead >= T(0);
  const Vec<T> smaller = exponential(input_leads ? -lead : lead);
  const Vec<T> one = splat(T(1));
  step.input = input_leads ? one : smaller;
  step.forget = input_leads ? smaller : one;
  step.squashed = hyperbolic_tangent(gates[2]);
  step.c_before = cell.c;
  step.n_before = cell.n;
  cell.c = step.forget * cell.c + step.input * step.squashed;
  cell.n = step.forget * cell.n + step.input;
  cell.m = input_leads ? gates[0] : decayed;
  step.output_odds = exponential(-gates[3]);  // (1 - sigmoid(o)) / sigmoid(o)
  step.per_normalizer = T(1) / (cell.n * (step.output_odds + T(1)));
  step.y = cell.c * step.per_normalizer;
  return step;
}

}  // namespace
