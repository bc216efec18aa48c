// Vectors as wide as the machine's, the elementary functions that the cells need on them, and small matrix products.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

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
// A tile of the products holds kTileSums vectors of sums; with its operands it has to fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileSums = 24, kTileRows = 4;
#else
constexpr int kTileSums = 8, kTileRows = 2;
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
#if defined(__AVX512F__)
inline unsigned lanes(int64_t count, int width) { return count >= width ? ~0u : (1u << count) - 1; }
template <> inline Vec<float> load(const float* from, int64_t count) {
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16(lanes(count, 16)), from));
}
template <> inline Vec<double> load(const double* from, int64_t count) {
  return Vec<double>(_mm512_maskz_loadu_pd(__mmask8(lanes(count, 8)), from));
}
template <> inline void store(float* to, Vec<float> value, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16(lanes(count, 16)), __m512(value));
}
template <> inline void store(double* to, Vec<double> value, int64_t count) {
  _mm512_mask_storeu_pd(to, __mmask8(lanes(count, 8)), __m512d(value));
}
#endif

// Lanes LANE(0), LANE(1), ... of a and, from `width` on, of b.
template <typename T, auto LANE, std::size_t... J>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::index_sequence<J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANE(int(J))...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::ivec{LANE(int(J))...});
#endif
}
template <typename T, auto LANE> inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle<T, LANE>(a, b, std::make_index_sequence<Simd<T>::width>());
}

// The sum of a vector's lanes.
template <typename T, int HALF = Simd<T>::width / 2> inline T total(Vec<T> x) {
  if constexpr (HALF == 0) return x[0];
  else return total<T, HALF / 2>(x + shuffle<T, [](int lane) { return lane ^ HALF; }>(x, x));
}

// Transposes a square of as many rows as a vector has lanes: halves swap places, then halves of the halves.
template <int HALF, typename T> inline void swap_halves(Vec<T> (&rows)[Simd<T>::width]) {
  constexpr int W = Simd<T>::width;
  for (int i = 0; i < W; ++i)
    if ((i & HALF) == 0) {
      const Vec<T> a = rows[i], b = rows[i + HALF];
      rows[i] = shuffle<T, [](int lane) { return lane & HALF ? W + lane - HALF : lane; }>(a, b);
      rows[i + HALF] = shuffle<T, [](int lane) { return lane & HALF ? W + lane : lane + HALF; }>(a, b);
    }
  if constexpr (HALF > 1) swap_halves<HALF / 2, T>(rows);
}

// to (columns, rows) = from (rows, columns) transposed; both sizes are multiples of the vector width.
template <typename T>
void transpose(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns) {
  constexpr int W = Simd<T>::width;
  for (int64_t row = 0; row < rows; row += W)
    for (int64_t column = 0; column < columns; column += W) {
      Vec<T> square[W];
      for (int i = 0; i < W; ++i) square[i] = load(from + (row + i) * from_row + column);
      swap_halves<W / 2, T>(square);
      for (int i = 0; i < W; ++i) store(to + (column + i) * to_row + row, square[i]);
    }
}

// Zeroed memory of one thread, handed out in up to 32 pieces that begin on cache lines.
template <typename T> class Scratch {
  static constexpr int64_t kLine = 64 / sizeof(T), kPieces = 32;
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  T* next_;

 public:
  explicit Scratch(int64_t count) {
    count += kPieces * kLine;
    next_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)));
    memory_.reset(next_);
    std::fill_n(next_, count, T(0));
  }
  T* take(int64_t count) { return std::exchange(next_, next_ + (count + kLine - 1) / kLine * kLine); }
};

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
// here. Small tiles take several k at a time, so that enough sums are under way.
template <typename T, int ROWS, int VECTORS>
inline void multiply_add(
    Vec<T> (&out)[ROWS][VECTORS], int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
    int64_t b_vector) {
  constexpr int SPLIT = std::max(1, std::min(4, kTileSums / (ROWS * VECTORS)));
  Vec<T> others[SPLIT][ROWS][VECTORS] = {};  // the first stays unused
  auto add = [&](Vec<T> (&sums)[ROWS][VECTORS]) {
    Vec<T> column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load(b + v * b_vector);
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * a_row];
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * column[v];
    }
    a += a_step;
    b += b_step;
  };
  for (; depth >= SPLIT; depth -= SPLIT) {
    add(out);
    for (int s = 1; s < SPLIT; ++s) add(others[s]);
  }
  for (; depth > 0; --depth) add(out);
  for (int s = 1; s < SPLIT; ++s)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) out[r][v] += others[s][r][v];
}

// Calls body(first row, number of rows as a compile-time constant) for rows in tiles of ROWS, and what is left
// over in smaller ones.
template <int ROWS = kTileRows, typename F> inline void in_tiles(int64_t rows, F body, int64_t row = 0) {
  for (; row + ROWS <= rows; row += ROWS) body(row, std::integral_constant<int, ROWS>{});
  if constexpr (ROWS > 1)
    if (row < rows) in_tiles<int(std::bit_floor(unsigned(ROWS - 1)))>(rows, body, row);
}

// out (rows, vectors) = a b, or with ACCUMULATE keep * out + a b, tile by tile, `b` in panels of up to four vectors.
template <bool ACCUMULATE, typename T>
void product(
    T* out, int64_t out_row, int64_t rows, int64_t vectors, int64_t depth, const T* a, int64_t a_row, int64_t a_step,
    const T* b, int64_t b_step, T keep = T(1)) {
  constexpr int W = Simd<T>::width;
  auto panel = [=](int64_t first, auto count) {
    constexpr int ROWS = std::min(8, kTileSums / count.value);
    in_tiles<ROWS>(rows, [=](int64_t row, auto tile) {
      Vec<T> sums[tile.value][count.value] = {};
      multiply_add<T, tile.value, count.value>(
          sums, depth, a + row * a_row, a_row, a_step, b + first * W, b_step, W);
#pragma GCC unroll 8
      for (int r = 0; r < tile.value; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < count.value; ++v) {
          T* to = out + (row + r) * out_row + (first + v) * W;
          store(to, ACCUMULATE ? keep * load(to) + sums[r][v] : sums[r][v]);
        }
    });
  };
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) panel(v, std::integral_constant<int, 4>{});
  switch (vectors - v) {
    case 3: panel(v, std::integral_constant<int, 3>{}); break;
    case 2: panel(v, std::integral_constant<int, 2>{}); break;
    case 1: panel(v, std::integral_constant<int, 1>{}); break;
  }
}

}  // namespace
