// The backward pass, from the last step to the first: a block multiplies the gradients of its own gates with its
// columns of R^T and sends every block the part of dy that falls to its units. Two copies of what is sent take turns:
// whoever sends the one after next has got the next from all, so all have read this one. Nothing else makes blocks
// wait.

struct Backward {
  const float* gates;  // pre-activations
  Index gates_sequence, gates_step, gates_gate, gates_head;  // strides, also those of dgates
  const Element* r;                                          // (4, H, D, D)
  const Element* dy;
  Index dy_sequence, dy_step, dy_head;
  const float* checkpoints;     // (segments, 3, B, H, D)
  const unsigned char* resets;  // (B, T), or null
  const float *dy_last, *dc_last, *dn_last;
  Element* dgates;
  float *dy_first, *dc_first, *dn_first;
  float* replayed;  // (SEGMENT, 3, B, H, D): c, n, m before each step of the segment at work
  int B, T, H;
};

constexpr int kBackwardSteps = product_steps(4 * kUnits);
constexpr int kRowTiles = divide_up(divide_up(D, 16), WARPS);  // of 16 units, of a warp
using GateGradientRows = Rows<4 * kUnits>;
using TransposedWeights = Weights<kRowTiles, kBackwardSteps>;
constexpr int kReplayedAtOnce = 4 / TILES;

constexpr int kReceivedPairs = BLOCKS * TILES * kUnits * 4;
static_assert(
    SHARED_BYTES ==
    2 * (TILES * GateGradientRows::kTileBytes + kReceivedPairs * sizeof(Pair) + sizeof(Mailbox)) +
        TransposedWeights::kSharedBytes);

// What a step makes of the gradients that reach it; known before they do.
struct Factors {
  float o_of_dy, c_of_dy, n_of_dy, i_of_dc, i_of_dn, f_of_dc, f_of_dn, z_of_dc, forget;

  DEVICE void prepare(const float (&gates)[4], const State& before) {
    State after = before;
    const Step step = advance(after, gates[0], gates[1], gates[2]);
    const float output = reciprocal(1.0f + exponential(-gates[3])), per_normalizer = reciprocal(after.n);
    const float y = output * after.c * per_normalizer;
    // sigmoid(-f), from e^-|f|
    const float forget_closed = (gates[1] < 0.0f ? 1.0f : step.forget_odds) * reciprocal(1.0f + step.forget_odds);
    o_of_dy = y * (1.0f - output);
    c_of_dy = output * per_normalizer;
    n_of_dy = -y * per_normalizer;
    i_of_dc = step.input * step.squashed;
    i_of_dn = step.input;
    f_of_dc = step.forget * forget_closed * before.c;
    f_of_dn = step.forget * forget_closed * before.n;
    z_of_dc = step.input * (1.0f - step.squashed * step.squashed);
    forget = step.forget;
  }
};

KERNEL slstm_backward(const Backward p) {
  const Place place(p.H, TILES * 8);
  const bool of_head = place.unit < D;
  const int first_of_warp = place.unit - place.row;
  char* const memory = shared_memory();
  Pair* const received = reinterpret_cast<Pair*>(memory + 2 * TILES * GateGradientRows::kTileBytes);
  // Where the part of dy from a block lies: for each tile and unit four pairs of sequences.
  auto slot = [&](int turn, int from, int tile, int unit) {
    return received + (turn & 1) * kReceivedPairs + ((from * TILES + tile) * kUnits + unit) * 4 + place.column;
  };
  auto rows_of = [&](int turn) { return memory + (turn & 1) * TILES * GateGradientRows::kTileBytes; };
  Mailbox* const boxes = reinterpret_cast<Mailbox*>(memory + SHARED_BYTES) - 2;
  if (place.thread < 2) open_mailbox(boxes + place.thread, 1);
  const int units_here = kPaddedD - place.rank * kUnits < kUnits ? kPaddedD - place.rank * kUnits : kUnits;
  const int bytes_expected = BLOCKS * TILES * 8 * units_here * sizeof(float);

  auto own_gradient = [&](int turn, int tile, int j, int gate) {
    const int column = gate * kUnits + place.warp * 8 + place.row;
    return GateGradientRows::at(rows_of(turn), tile * 8 + place.column * 2 + j, column);
  };

  TransposedWeights weights;
  weights.load(reinterpret_cast<char*>(received + 2 * kReceivedPairs), place, [&](int step, int m, int word, int e) {
    const int to = (m * WARPS + place.warp) * 16 + word % 2 * 8 + place.row;
    const int k = column_of(place, step, word / 2) + e, unit = place.rank * kUnits + k % kUnits;
    return to < D && unit < D ? p.r[((Index(k / kUnits) * p.H + place.head) * D + to) * D + unit] : Element{};
  });

  // Places in tensors: in (B, H, D), and in the gates, whose kinds follow at distances of gates_gate.
  const Index first_cell = (Index(place.first_sequence()) * p.H + place.head) * D + place.unit;
  const Index first_gate = place.first_sequence() * p.gates_sequence + place.head * p.gates_head + place.unit;
  const Index first_dy = place.first_sequence() * p.dy_sequence + place.head * p.dy_head + place.unit;
  auto cell = [&](int tile, int j) { return first_cell + Index(place.distance(tile, j)) * p.H * D; };
  auto gate_at = [&](int tile, int j, int t) {
    return first_gate + (place.distance(tile, j) * p.gates_sequence + t * p.gates_step);
  };
  auto dy_at = [&](int tile, int j, int t) {
    return first_dy + (place.distance(tile, j) * p.dy_sequence + t * p.dy_step);
  };

  bool valid[TILES][2];
  float dy[TILES][2], dc[TILES][2], dn[TILES][2];
  UNROLL for (int tile = 0; tile < TILES; ++tile)
    UNROLL for (int j = 0; j < 2; ++j) {
      const int sequence = place.sequence_of(tile, j);
      valid[tile][j] = of_head && sequence < p.B;
      dy[tile][j] = valid[tile][j] ? p.dy_last[cell(tile, j)] : 0.0f;
      dc[tile][j] = valid[tile][j] ? p.dc_last[cell(tile, j)] : 0.0f;
      dn[tile][j] = valid[tile][j] ? p.dn_last[cell(tile, j)] : 0.0f;
    }
  const Index part = Index(p.B) * p.H * D;
  auto reset_at = [&](int tile, int j, int t) {
    return p.resets && valid[tile][j] && p.resets[Index(place.sequence_of(tile, j)) * p.T + t];
  };

  float gates[TILES][2][4], dy_of_output[TILES][2];
  State before[TILES][2];
  Factors factors[TILES][2];
  bool reset[TILES][2];
  auto fetch = [&](int t) {
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        const bool taken = valid[tile][j];
        const float* from = p.gates + gate_at(tile, j, t);
        UNROLL for (int gate = 0; gate < 4; ++gate) gates[tile][j][gate] = taken ? from[gate * p.gates_gate] : 0.0f;
        const float* replayed = p.replayed + t % SEGMENT * 3 * part + cell(tile, j);
        before[tile][j].c = taken ? replayed[0] : 0.0f;
        before[tile][j].n = taken ? replayed[part] : 0.0f;
        before[tile][j].m = taken ? replayed[2 * part] : 0.0f;
        dy_of_output[tile][j] = taken ? to_float(p.dy[dy_at(tile, j, t)]) : 0.0f;
        reset[tile][j] = reset_at(tile, j, t);
      }
  };
  auto prepare = [&] {
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) factors[tile][j].prepare(gates[tile][j], before[tile][j]);
  };
  // c, n and m before each step from start to end, as the forward pass had them.
  auto replay = [&](int start, int end) {
    State state[TILES][2];
    UNROLL for (int tile = 0; tile < TILES; ++tile)
      UNROLL for (int j = 0; j < 2; ++j) {
        if (!valid[tile][j]) continue;
        const float* from = p.checkpoints + Index(start / SEGMENT) * 3 * part + cell(tile, j);
        state[tile][j] = {from[0], from[part], from[2 * part]};
      }
    for (int first = start; first < end; first += kReplayedAtOnce) {
      float ifz[kReplayedAtOnce][TILES][2][3];
      unsigned emptied = 0;  // a bit for each cell and step
      UNROLL for (int s = 0; s < kReplayedAtOnce; ++s)
        UNROLL for (int tile = 0; tile < TILES; ++tile)
          UNROLL for (int j = 0; j < 2; ++j) {
            const bool taken = valid[tile][j] && first + s < end;
            const float* from = p.gates + gate_at(tile, j, first + s);
            UNROLL for (int gate = 0; gate < 3; ++gate) {
              ifz[s][tile][j][gate] = taken ? from[gate * p.gates_gate] : 0.0f;
            }
            if (taken && reset_at(tile, j, first + s)) emptied |= 1u << ((s * TILES + tile) * 2 + j);
          }
      UNROLL for (int s = 0; s < kReplayedAtOnce; ++s)
        UNROLL for (int tile = 0; tile < TILES; ++tile)
          UNROLL for (int j = 0; j < 2; ++j) {
            if (!valid[tile][j] || first + s >= end) continue;
            State& own = state[tile][j];
            if (emptied >> ((s * TILES + tile) * 2 + j) & 1) own.empty();
            float* to = p.replayed + (first + s) % SEGMENT * 3 * part + cell(tile, j);
            to[0] = own.c, to[part] = own.n, to[2 * part] = own.m;
            advance(own, ifz[s][tile][j][0], ifz[s][tile][j][1], ifz[s][tile][j][2]);
          }
    }
  };

  synchronize_cluster();  // all blocks run and have opened their mailboxes

  for (int start = (p.T - 1) / SEGMENT * SEGMENT; start >= 0; start -= SEGMENT) {
    const int end = start + SEGMENT < p.T ? start + SEGMENT : p.T;
    replay(start, end);
    fetch(end - 1);
    prepare();
    for (int t = end - 1; t >= start; --t) {
      const int turn = p.T - 1 - t;
      bool dropped[TILES][2];  // the gradient of the state before this step; nobody sends that of a unit that is none
      UNROLL for (int tile = 0; tile < TILES; ++tile)
        UNROLL for (int j = 0; j < 2; ++j) {
          const Factors& f = factors[tile][j];
          const float dy_ = dy[tile][j] + dy_of_output[tile][j];
          const float dc_ = dc[tile][j] + dy_ * f.c_of_dy, dn_ = dn[tile][j] + dy_ * f.n_of_dy;
          const float results[4] = {
              dc_ * f.i_of_dc + dn_ * f.i_of_dn, dc_ * f.f_of_dc + dn_ * f.f_of_dn, dc_ * f.z_of_dc, dy_ * f.o_of_dy};
          UNROLL for (int gate = 0; gate < 4; ++gate) convert(results[gate], *own_gradient(turn, tile, j, gate));
          dropped[tile][j] = reset[tile][j] || !valid[tile][j];
          dc[tile][j] = dropped[tile][j] ? 0.0f : dc_ * f.forget;
          dn[tile][j] = dropped[tile][j] ? 0.0f : dn_ * f.forget;
        }
      if (t > start) fetch(t - 1);
      if (t >= SEGMENT) {  // for the replay to come
        UNROLL for (int tile = 0; tile < TILES; ++tile) {
          const int sequence = place.sequence + tile * 8 + place.lane % 8, gate = place.lane / 8;
          if (first_of_warp < D && sequence < p.B) {
            prefetch(p.gates + sequence * p.gates_sequence + (t - SEGMENT) * p.gates_step + gate * p.gates_gate +
                     place.head * p.gates_head + first_of_warp);
          }
        }
      }
      synchronize_block();
      if (place.thread == 0) arrive_expecting(boxes + (turn & 1), bytes_expected);

      float sums[kRowTiles][TILES][4] = {};
      multiply(sums, weights, rows_of(turn), place, GateGradientRows{});
      UNROLL for (int m = 0; m < kRowTiles; ++m)
        UNROLL for (int half = 0; half < 2; ++half) {
          const int unit = (m * WARPS + place.warp) * 16 + half * 8;
          if (unit >= D) continue;
          UNROLL for (int tile = 0; tile < TILES; ++tile) {
            const Pair pair = {{sums[m][tile][half * 2], sums[m][tile][half * 2 + 1]}};
            send(slot(turn, place.rank, tile, unit % kUnits + place.row), unit / kUnits, pair, boxes + (turn & 1));
          }
        }
      UNROLL for (int tile = 0; tile < TILES; ++tile)
        UNROLL for (int j = 0; j < 2; ++j)
          UNROLL for (int gate = 0; gate < 4; ++gate) {
            Element* const to = p.dgates + gate_at(tile, j, t) + gate * p.gates_gate;
            if (valid[tile][j]) *to = *own_gradient(turn, tile, j, gate);
          }
      if (t > start) prepare();
      wait_for_mail(boxes + (turn & 1), turn >> 1 & 1);
      UNROLL for (int tile = 0; tile < TILES; ++tile) {
        float sum[2] = {};
        UNROLL for (int from = 0; from < BLOCKS; ++from) {
          const Pair pair = *slot(turn, from, tile, place.warp * 8 + place.row);
          sum[0] += pair.value[0], sum[1] += pair.value[1];
        }
        UNROLL for (int j = 0; j < 2; ++j) dy[tile][j] = dropped[tile][j] ? 0.0f : sum[j];
      }
    }
  }

  UNROLL for (int tile = 0; tile < TILES; ++tile)
    UNROLL for (int j = 0; j < 2; ++j) {
      if (!valid[tile][j]) continue;
      p.dy_first[cell(tile, j)] = dy[tile][j];
      p.dc_first[cell(tile, j)] = dc[tile][j];
      p.dn_first[cell(tile, j)] = dn[tile][j];
    }
}
