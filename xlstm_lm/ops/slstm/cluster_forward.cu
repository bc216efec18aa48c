// The forward pass: a block multiplies its rows of R with the whole y, makes its part of the next y, and sends that to
// the other blocks. Two copies of y take turns: whoever sends the one after next has got the next from all, so all have
// read this one. Nothing else makes blocks wait.

struct Forward {
  const Element* wx;
  Index wx_sequence, wx_step, wx_gate, wx_head;  // strides, in elements
  const Element* r;                              // (4, H, D, D)
  const float* bias;                             // (4, H, D)
  const unsigned char* resets;                   // (B, T), or null
  const float *y_first, *c_first, *n_first, *m_first;
  Element* y;          // (B, T, H, D)
  float* checkpoints;  // (segments, 3, B, H, D)
  float *y_last, *c_last, *n_last, *m_last;
  int B, T, H;
};

constexpr int kForwardSteps = product_steps(D);
using OutputRows = Rows<kForwardSteps * 2 * kPerChunk>;  // a step takes half of four chunks
using GateWeights = Weights<2, kForwardSteps>;
constexpr int kPrefetchSteps = 8;

static_assert(SHARED_BYTES == 2 * (TILES * OutputRows::kTileBytes + sizeof(Mailbox)) + GateWeights::kSharedBytes);

KERNEL slstm_forward(const Forward p) {
  const Place place(p.H, TILES * 8);
  const bool of_head = place.unit < D;
  const int first_of_warp = place.unit - place.row;
  char* const memory = shared_memory();
  auto rows_of = [&](int t) { return memory + (t & 1) * TILES * OutputRows::kTileBytes; };
  Mailbox* const boxes = reinterpret_cast<Mailbox*>(memory + SHARED_BYTES) - 2;
  if (place.thread < 2) open_mailbox(boxes + place.thread, WARPS);
  const int units_here = kPaddedD - place.rank * kUnits < kUnits ? kPaddedD - place.rank * kUnits : kUnits;
  const int bytes_expected = TILES * 8 * (kPaddedD - units_here) * sizeof(Element);

  // The warp's rows of R are, by tile, gates i and f, or z and o, of its 8 units.
  GateWeights weights;
  weights.load(memory + 2 * TILES * OutputRows::kTileBytes, place, [&](int step, int m, int word, int e) {
    const int gate = m * 2 + word % 2, k = column_of(place, step, word / 2) + e;
    return of_head && k < D ? p.r[((Index(gate) * p.H + place.head) * D + k) * D + place.unit] : Element{};
  });
  float bias[4];
  UNROLL for (int gate = 0; gate < 4; ++gate) {
    bias[gate] = of_head ? p.bias[(gate * p.H + place.head) * D + place.unit] : 0.0f;
  }

  // Places in tensors: in (B, H, D), in wx and in y.
  const Index first_cell = (Index(place.first_sequence()) * p.H + place.head) * D + place.unit;
  const Index first_wx = place.first_sequence() * p.wx_sequence + place.head * p.wx_head + place.unit;
  const Index first_y = (Index(place.first_sequence()) * p.T * p.H + place.head) * D + place.unit;
  auto cell = [&](int tile, int j) { return first_cell + Index(place.distance(tile, j)) * p.H * D; };
  auto wx_at = [&](int tile, int j, int t) {
    return first_wx + (place.distance(tile, j) * p.wx_sequence + t * p.wx_step);
  };
  auto y_at = [&](int tile, int j, int t) {
    return first_y + (Index(place.distance(tile, j)) * p.T + t) * p.H * D;
  };

  State state[TILES][2];
  bool valid[TILES][2];
  float y[TILES][2];
  UNROLL for (int tile = 0; tile < TILES; ++tile)
    UNROLL for (int j = 0; j < 2; ++j) {
      const int sequence = place.sequence_of(tile, j);
      valid[tile][j] = of_head && sequence < p.B;
      state[tile][j].empty();
      if (valid[tile][j]) {
        state[tile][j] = {p.c_first[cell(tile, j)], p.n_first[cell(tile, j)], p.m_first[cell(tile, j)]};
      }
    }
  auto reset_at = [&](int sequence, int t) {
    return p.resets && sequence < p.B && p.resets[Index(sequence) * p.T + t];
  };
  constexpr int kColumns = kForwardSteps * 2 * kPerChunk;
  for (int k = place.thread; k < TILES * 8 * kColumns; k += kThreads) {
    const int sequence = place.sequence + k / kColumns, unit = k % kColumns;
    const bool taken = unit < D && sequence < p.B && !reset_at(sequence, 0);
    convert(taken ? p.y_first[(Index(sequence) * p.H + place.head) * D + unit] : 0.0f,
            *OutputRows::at(rows_of(0), k / kColumns, unit));
    *OutputRows::at(rows_of(1), k / kColumns, unit) = Element{};
  }

  // What a step needs of device memory is read during the step before.
  Element wx[TILES][2][4];
  bool reset[TILES][2];
  auto fetch = [&](int t) {
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        const Element* from = p.wx + wx_at(tile, j, t);
        UNROLL for (int gate = 0; gate < 4; ++gate) {
          wx[tile][j][gate] = valid[tile][j] ? from[gate * p.wx_gate] : Element{};
        }
        reset[tile][j] = reset_at(place.sequence_of(tile, j), t);
      }
  };
  fetch(0);
  synchronize_cluster();  // all blocks run and have opened their mailboxes

  for (int t = 0; t < p.T; ++t) {
    if (t % SEGMENT == 0) {
      float* to = p.checkpoints + Index(t / SEGMENT) * 3 * p.B * p.H * D;
      const Index part = Index(p.B) * p.H * D;
      UNROLL for (int tile = 0; tile < TILES; ++tile)
        UNROLL for (int j = 0; j < 2; ++j) {
          if (!valid[tile][j]) continue;
          to[cell(tile, j)] = state[tile][j].c;
          to[cell(tile, j) + part] = state[tile][j].n;
          to[cell(tile, j) + 2 * part] = state[tile][j].m;
        }
    }
    float gates[2][TILES][4];  // i f, z o; of both cells the first gate, then the second
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        UNROLL for (int gate = 0; gate < 4; ++gate) {
          gates[gate / 2][tile][gate % 2 * 2 + j] = to_float(wx[tile][j][gate]) + bias[gate];
        }
        if (reset[tile][j]) state[tile][j].empty();
      }
    if (t + 1 < p.T) fetch(t + 1);
    if (t + kPrefetchSteps < p.T) {
      UNROLL for (int tile = 0; tile < TILES; ++tile) {
        const int sequence = place.sequence + tile * 8 + place.lane % 8, gate = place.lane / 8;
        if (first_of_warp < D && sequence < p.B) {
          prefetch(p.wx + sequence * p.wx_sequence + (t + kPrefetchSteps) * p.wx_step + gate * p.wx_gate +
                   place.head * p.wx_head + first_of_warp);
        }
      }
    }
    multiply(gates, weights, rows_of(t), place, OutputRows{});

    Element rounded[TILES][2];
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        State& s = state[tile][j];
        advance(s, gates[0][tile][j], gates[0][tile][2 + j], gates[1][tile][j]);
        convert(s.c * reciprocal(s.n * (1.0f + exponential(-gates[1][tile][2 + j]))), rounded[tile][j]);
        y[tile][j] = to_float(rounded[tile][j]);
      }

    if (t + 1 < p.T) {
      char* const rows = rows_of(t + 1);
      if (first_of_warp < D) {
        UNROLL for (int tile = 0; tile < TILES; ++tile)
          UNROLL for (int j = 0; j < 2; ++j) {
            *OutputRows::at(rows, tile * 8 + place.column * 2 + j, place.unit) =
                reset[tile][j] ? Element{} : rounded[tile][j];
          }
        synchronize_warp();
        UNROLL for (int tile = 0; tile < TILES; ++tile)
          UNROLL for (int part = 0; part < 8 / kPerChunk; ++part) {
            Chunk* const own = reinterpret_cast<Chunk*>(
                OutputRows::at(rows, tile * 8 + place.row, first_of_warp + part * kPerChunk));
            const Chunk value = *own;
            UNROLL for (int turn = 0; turn < divide_up(BLOCKS, 4); ++turn) {
              const int to = turn * 4 + place.column;
              if (to < BLOCKS && to != place.rank) send(own, to, value, boxes + (t & 1));
            }
          }
      }
      if (place.thread == 0) arrive_expecting(boxes + (t & 1), bytes_expected);
      else if (place.lane == 0) arrive(boxes + (t & 1));
    }
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        if (valid[tile][j]) p.y[y_at(tile, j, t)] = rounded[tile][j];
      }
    if (t + 1 < p.T) wait_for_mail(boxes + (t & 1), t >> 1 & 1);
  }

  UNROLL for (int tile = 0; tile < TILES; ++tile)
    UNROLL for (int j = 0; j < 2; ++j) {
      if (!valid[tile][j]) continue;
      p.y_last[cell(tile, j)] = y[tile][j];
      p.c_last[cell(tile, j)] = state[tile][j].c;
      p.n_last[cell(tile, j)] = state[tile][j].n;
      p.m_last[cell(tile, j)] = state[tile][j].m;
    }
}
