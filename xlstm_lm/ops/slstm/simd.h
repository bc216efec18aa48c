// Vectors as wide as the machine's, the elementary functions that the cell needs on them, and small matrix products.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// A tile of the products is kTileRows rows by four vectors of sums; with its operands it has to fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 2;
#endif

template <typename T> struct Simd {
  static constexpr int width = kVectorBytes / sizeof(T);
  typedef T vec __attribute__((vector_size(kVectorBytes)));
  using integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef integer ivec __attribute__((vector_size(kVectorBytes)));
};
template <typename T> using Vec = typename Simd<T>::vec;

template <typename T> inline Vec<T> splat(T value) { return Vec<T>{} + value; }
template <typename T> inline Vec<T> load(const T* from) {
  Vec<T> out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
template <typename T> inline Vec<T> load(const T* from, int64_t count) {
  if (count >= Simd<T>::width) return load(from);
  Vec<T> out{};
  std::memcpy(&out, from, count * sizeof(T));
  return out;
}
template <typename T> inline void store(T* to, Vec<T> value) { std::memcpy(to, &value, sizeof(value)); }
template <typename T> inline void store(T* to, Vec<T> value, int64_t count) {
  std::memcpy(to, &value, std::min<int64_t>(count, Simd<T>::width) * sizeof(T));
}

// Elementary functions. float: polynomials fitted by reweighted least squares to a relative error below 1e-8, before
// rounding. double: the standard library's, lane by lane; it is there to be exact. NaN stays NaN.

template <typename F> inline Vec<double> by_lane(Vec<double> x, F function) {
  for (int lane = 0; lane < Simd<double>::width; ++lane) x[lane] = function(x[lane]);
  return x;
}

inline Vec<double> exponential(Vec<double> x) { return by_lane(x, [](double v) { return std::exp(v); }); }
inline Vec<double> hyperbolic_tangent(Vec<double> x) { return by_lane(x, [](double v) { return std::tanh(v); }); }
inline Vec<double> log_one_plus(Vec<double> x) { return by_lane(x, [](double v) { return std::log1p(v); }); }

// e^x; exactly 0 below the smallest normal number, and e^88 above 88.
inline Vec<float> exponential(Vec<float> x) {
  const float lowest = -87.33f, highest = 88.0f, round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  Vec<float> clamped = x < lowest ? splat(lowest) : x;
  clamped = clamped > highest ? splat(highest) : clamped;
  const Vec<float> shifted = clamped * 1.442695041f + round;
  const Vec<float> power = shifted - round;
  const Vec<float> r = clamped - power * 0.693145752f - power * 1.428606820e-6f;
  Vec<float> p = splat(0.001381446674f);
  p = p * r + 0.008368780429f;
  p = p * r + 0.04166839422f;
  p = p * r + 0.1666652011f;
  p = p * r + 0.4999999341f;
  p = p * r * r + r + 1.0f;
  const auto scale = (std::bit_cast<Simd<float>::ivec>(shifted) << 23) + 0x3f800000;
  return x < lowest ? Vec<float>{} : p * std::bit_cast<Vec<float>>(scale);
}

// log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)).
inline Vec<float> log_one_plus(Vec<float> x) {
  const Vec<float> s = x / (x + 2.0f), u = s * s;
  Vec<float> p = splat(0.2802514065f);
  p = p * u + 0.2799901331f;
  p = p * u + 0.4002170614f;
  p = p * u + 0.6666641302f;
  return s * (p * u + 2.0f);
}

inline Vec<float> hyperbolic_tangent(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x, u = x * x;
  Vec<float> p = splat(-0.005905867948f);
  p = p * u + 0.02080538418f;
  p = p * u + -0.05378668345f;
  p = p * u + 0.1333195824f;
  p = p * u + -0.3333329927f;
  const Vec<float> near = x + x * u * p;
  const Vec<float> decay = exponential(size * -2.0f);
  const Vec<float> far = (1.0f - decay) / (1.0f + decay);
  return size < 0.6f ? near : (x < 0.0f ? -far : far);
}

// Denormal numbers are flushed to zero on this thread as long as the object lives; on x86, where they are slow.
class FlushDenormals {
#if defined(__x86_64__)
  unsigned int before_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#endif
};

// out[r][v] += sum over k of a[r * a_row + k * a_step] * b[k * b_step + v * b_vector]: the heart of every product
// here. Few rows take several k at a time, so that enough sums are under way.
template <typename T, int ROWS, int VECTORS>
inline void multiply_add(
    Vec<T> (&out)[ROWS][VECTORS], int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
    int64_t b_vector) {
  constexpr int SPLIT = kTileRows / ROWS;
  Vec<T> sums[SPLIT][ROWS][VECTORS] = {};
  int64_t k = 0;
  for (; k + SPLIT <= depth; k += SPLIT)
    for (int s = 0; s < SPLIT; ++s) {
      Vec<T> column[VECTORS];
      for (int v = 0; v < VECTORS; ++v) column[v] = load(b + (k + s) * b_step + v * b_vector);
      for (int r = 0; r < ROWS; ++r) {
        const T factor = a[r * a_row + (k + s) * a_step];
        for (int v = 0; v < VECTORS; ++v) sums[s][r][v] += factor * column[v];
      }
    }
  for (; k < depth; ++k)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v)
        sums[0][r][v] += a[r * a_row + k * a_step] * load(b + k * b_step + v * b_vector);
  for (int s = 0; s < SPLIT; ++s)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) out[r][v] += sums[s][r][v];
}

// Calls body(first row, number of rows as a compile-time constant) for rows in tiles.
template <typename F> inline void in_tiles(int64_t rows, F body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body(row, std::integral_constant<int, kTileRows>{});
  if constexpr (kTileRows > 2)
    if (row + 2 <= rows) {
      body(row, std::integral_constant<int, 2>{});
      row += 2;
    }
  if (row < rows) body(row, std::integral_constant<int, 1>{});
}

// out (rows, vectors) = or += a b, tile by tile; `b` panels of four vectors and then of one.
template <bool ACCUMULATE, typename T>
void product(
    T* out, int64_t out_row, int64_t rows, int64_t vectors, int64_t depth, const T* a, int64_t a_row, int64_t a_step,
    const T* b, int64_t b_step) {
  constexpr int W = Simd<T>::width;
  auto panel = [&](int64_t first, auto count) {
    in_tiles(rows, [&](int64_t row, auto tile) {
      Vec<T> sums[tile.value][count.value] = {};
      multiply_add<T, tile.value, count.value>(
          sums, depth, a + row * a_row, a_row, a_step, b + first * W, b_step, W);
      for (int r = 0; r < tile.value; ++r)
        for (int v = 0; v < count.value; ++v) {
          T* to = out + (row + r) * out_row + (first + v) * W;
          store(to, ACCUMULATE ? load(to) + sums[r][v] : sums[r][v]);
        }
    });
  };
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) panel(v, std::integral_constant<int, 4>{});
  for (; v < vectors; ++v) panel(v, std::integral_constant<int, 1>{});
}

}  // namespace
