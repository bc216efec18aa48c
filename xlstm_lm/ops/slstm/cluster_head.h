// What both passes of the cluster kernels share: which part of a head a thread has, how the matrices lie, and the
// cell.
//
// One cluster computes one head for TILES * 8 sequences. Each of its BLOCKS blocks has 8 * WARPS units of the head,
// each warp 8 of them, and of these each thread the unit `row` for the sequences 2 * column and 2 * column + 1 of
// every tile: its place in the result of a tensor core product, so states and gates never leave the registers of
// their thread.
//
// D, BLOCKS, WARPS, TILES, HELD, SEGMENT (steps between checkpoints) and Element are macros that the compiler is given.

#define UNROLL _Pragma("unroll")

using Index = long long;

constexpr int kThreads = 32 * WARPS;
constexpr int kUnits = 8 * WARPS;                  // of a block
constexpr int kPaddedD = (D + 7) / 8 * 8;
constexpr int kPerChunk = 16 / sizeof(Element);    // elements in 16 bytes,
constexpr int kPerWord = 4 / sizeof(Element);      // and in 4
constexpr bool kApproximate = sizeof(Element) == 2;  // functions as exact as 16-bit results need

DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Place {
  int thread, warp, lane, row, column;  // row, column: of the thread in the tensor cores' 8 x 4
  int rank, head, sequence;             // sequence: the first of the cluster
  int unit;                             // of the head

  DEVICE Place(int heads, int sequences) {
    thread = thread_index();
    warp = thread / 32, lane = thread % 32, row = lane / 4, column = lane % 4;
    rank = block_rank();
    head = cluster_index() % heads, sequence = cluster_index() / heads * sequences;
    unit = rank * kUnits + warp * 8 + row;
  }
  // The sequence of the thread's j-th cell in a tile: the thread's first sequence and a distance that is the same for
  // all threads. Addresses are made in these two parts, because the GPU has registers apart for what all threads
  // share.
  DEVICE int sequence_of(int tile, int j) const { return first_sequence() + distance(tile, j); }
  DEVICE int first_sequence() const { return sequence + column * 2; }
  static DEVICE int distance(int tile, int j) { return tile * 8 + j; }
};

// The right-hand matrix of a product, transposed, in shared memory: a row of COLUMNS elements for each sequence. A
// thread reads 16 bytes of a row at once, which are its part of two steps of the product (the order of a product's
// terms is free). Rows are shifted against each other so that neither this nor writing single elements meets bank
// conflicts.
template <int COLUMNS> struct Rows {
  static constexpr int kPitch = divide_up(COLUMNS * sizeof(Element), 128) * 128;
  static constexpr int kPairOfRows = 2 * kPitch + 144;
  static constexpr int kTileBytes = 4 * kPairOfRows;

  static DEVICE Element* at(char* rows, int row, int column) {
    return reinterpret_cast<Element*>(rows + (row >> 1) * kPairOfRows + (row & 1) * (kPitch + 64)) + column;
  }
};

DEVICE constexpr int product_steps(int columns) { return 2 * divide_up(columns, 4 * kPerChunk); }

// Where in the right-hand matrix a thread's word `half` of a step stands, and so what its left-hand words multiply.
DEVICE int column_of(const Place& place, int step, int half) {
  return (step / 2 * 4 + place.column) * kPerChunk + (step % 2 * 2 + half) * kPerWord;
}

// A thread's share of a left-hand matrix of M tiles of 16 rows that stays for the whole sequence, in fragments of 16
// bytes, ordered by step and tile: those of the first steps in registers, at most HELD, the rest in shared memory.
template <int M, int STEPS> struct Weights {
  static constexpr int kHeldSteps = HELD / (2 * M) * 2 < STEPS ? HELD / (2 * M) * 2 : STEPS;
  static constexpr int kHeld = kHeldSteps * M;
  static constexpr int kKept = STEPS * M - kHeld;
  static constexpr int kSharedBytes = (kHeld > kKept ? kHeld : kKept) * kThreads * 16;
  Chunk held[kHeld > 0 ? kHeld : 1];
  Chunk* kept;

  // element(step, m, word, e): the e-th element of a word. Through shared memory, for a loop cannot fill registers.
  template <typename F> DEVICE void load(char* memory, const Place& place, F element) {
    kept = reinterpret_cast<Chunk*>(memory) + place.thread;
    auto keep = [&](int first, int count) {
      for (int f = 0; f < count; ++f) {
        Element* const to = reinterpret_cast<Element*>(kept + f * kThreads);
        UNROLL for (int e = 0; e < kPerChunk; ++e) {
          to[e] = element((first + f) / M, (first + f) % M, e / kPerWord, e % kPerWord);
        }
      }
    };
    keep(0, kHeld);
    UNROLL for (int f = 0; f < kHeld; ++f) held[f] = kept[f * kThreads];
    keep(kHeld, kKept);
  }
};

// In float32, three products of the 11-bit parts: what is left out is about 2^-22 of a product.
DEVICE void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, float) {
  auto low_part = [](unsigned word, unsigned high) { return nearest_tf32(from_bits(word) - from_bits(high)); };
  Chunk high, low;
  UNROLL for (int k = 0; k < 4; ++k) {
    high.word[k] = nearest_tf32(from_bits(a.word[k]));
    low.word[k] = low_part(a.word[k], high.word[k]);
  }
  const unsigned high0 = nearest_tf32(from_bits(b0)), high1 = nearest_tf32(from_bits(b1));
  multiply_add_tf32(sums, low, high0, high1);
  multiply_add_tf32(sums, high, low_part(b0, high0), low_part(b1, high1));
  multiply_add_tf32(sums, high, high0, high1);
}

// sums[m][tile] += weights[m] * rows[tile].
template <int M, int STEPS, typename Layout>
DEVICE void multiply(
    float (&sums)[M][TILES][4], const Weights<M, STEPS>& weights, char* rows, const Place& place, Layout) {
  // So few sums would wait for each other's results: twice as many, for every other step.
  constexpr int kParts = M * TILES < 4 ? 2 : 1;
  float parts[kParts][M][TILES][4] = {};
  auto two_steps = [&](int step, const Chunk* a, int stride) {
    Chunk b[TILES];
    UNROLL for (int tile = 0; tile < TILES; ++tile) {
      const int at = (step / 2 * 4 + place.column) * kPerChunk;
      b[tile] = *reinterpret_cast<const Chunk*>(Layout::at(rows, tile * 8 + place.row, at));
    }
    UNROLL for (int j = 0; j < 2; ++j)
      UNROLL for (int m = 0; m < M; ++m) {
        const Chunk left = a[(j * M + m) * stride];
        UNROLL for (int tile = 0; tile < TILES; ++tile) {
          multiply_add(parts[j % kParts][m][tile], left, b[tile].word[2 * j], b[tile].word[2 * j + 1], Element{});
        }
      }
  };
  constexpr int kHeldSteps = Weights<M, STEPS>::kHeldSteps;
  UNROLL for (int step = 0; step < kHeldSteps; step += 2) two_steps(step, &weights.held[step * M], 1);
  constexpr int kAtOnce = kApproximate || TILES == 1 ? 2 : 1;  // float32's parts take many registers
  _Pragma("unroll kAtOnce") for (int step = kHeldSteps; step < STEPS; step += 2) {
    two_steps(step, weights.kept + (step - kHeldSteps) * M * kThreads, kThreads);
  }
  UNROLL for (int part = 0; part < kParts; ++part)
    UNROLL for (int m = 0; m < M; ++m)
      UNROLL for (int tile = 0; tile < TILES; ++tile)
        UNROLL for (int k = 0; k < 4; ++k) sums[m][tile][k] += parts[part][m][tile][k];
}

DEVICE float exponential(float x) { return kApproximate ? approximate_exp2(x * 1.44269504f) : expf(x); }
DEVICE float log_one_plus(float x) { return kApproximate ? approximate_log2(1.0f + x) * 0.693147181f : log1pf(x); }
DEVICE float reciprocal(float x) { return kApproximate ? approximate_reciprocal(x) : 1.0f / x; }
DEVICE float hyperbolic_tangent(float x) {
  return kApproximate ? 2.0f * approximate_reciprocal(1.0f + approximate_exp2(x * -2.88539008f)) - 1.0f : tanhf(x);
}

struct State {
  float c, n, m;

  DEVICE void empty() { c = n = 0.0f, m = from_bits(0xff800000u); }  // m = -inf
};

struct Step {
  float input, forget, squashed, forget_odds;
};

// One step of the cell but for the output gate. Of exp(i - m) and exp(logsigmoid(f) + m' - m) one is always 1; from an
// empty state, m' = -inf, the other is exactly 0.
DEVICE Step advance(State& state, float i, float f, float z) {
  Step step;
  step.forget_odds = exponential(-fabsf(f));
  const float decayed = fminf(f, 0.0f) - log_one_plus(step.forget_odds) + state.m;
  const float lead = i - decayed;
  const float smaller = exponential(-fabsf(lead));
  step.input = lead >= 0.0f ? 1.0f : smaller;
  step.forget = lead >= 0.0f ? smaller : 1.0f;
  step.squashed = hyperbolic_tangent(z);
  state.c = step.forget * state.c + step.input * step.squashed;
  state.n = step.forget * state.n + step.input;
  state.m = fmaxf(i, decayed);
  return step;
}
