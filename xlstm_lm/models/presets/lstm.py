"""LSTM, GRU and plain recurrence, for a CPU, of the sizes of the xLSTMs."""

from __future__ import annotations

from typing import Any

_TWO_LAYERS: dict[str, Any] = {"family": "lstm", "num_blocks": 2}
_LSTM, _GRU, _RNN = (_TWO_LAYERS | {"cell": cell} for cell in ("lstm", "gru", "rnn"))

PRESETS: dict[str, dict[str, Any]] = {
    # On bytes
    "lstm-cpu-0.7m": _LSTM | {"vocab_size": 257, "embedding_dim": 128, "hidden_dim": 208},
    "lstm-cpu-1m": _LSTM | {"vocab_size": 257, "embedding_dim": 144, "hidden_dim": 256},
    "gru-cpu-0.7m": _GRU | {"vocab_size": 257, "embedding_dim": 128, "hidden_dim": 240},
    "gru-cpu-1m": _GRU | {"vocab_size": 257, "embedding_dim": 144, "hidden_dim": 296},
    "rnn-cpu-0.7m": _RNN | {"vocab_size": 257, "embedding_dim": 362},
    "rnn-cpu-1m": _RNN | {"vocab_size": 257, "embedding_dim": 448},
    # On tokens
    "lstm-cpu-8.5m": _LSTM | {"vocab_size": 4096, "embedding_dim": 320, "hidden_dim": 584},
    "gru-cpu-8.5m": _GRU | {"vocab_size": 4096, "embedding_dim": 320, "hidden_dim": 656},
}
