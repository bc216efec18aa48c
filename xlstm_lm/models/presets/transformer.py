"""Llama-style transformers (arXiv 2302.13971) of the sizes of the xLSTMs."""

from __future__ import annotations

from typing import Any

_TRANSFORMER: dict[str, Any] = {"family": "transformer", "vocab_size": 50304}
_BYTES = {"family": "transformer", "vocab_size": 257, "num_heads": 4}

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-165m": _TRANSFORMER
    | {"embedding_dim": 768, "num_blocks": 12, "num_heads": 12, "feedforward_dim": 2112},
    "transformer-400m": _TRANSFORMER | {"embedding_dim": 1024, "num_blocks": 24, "num_heads": 16},
    "transformer-830m": _TRANSFORMER
    | {"embedding_dim": 1536, "num_blocks": 24, "num_heads": 24, "feedforward_dim": 4160},
    "transformer-1.3b": _TRANSFORMER | {"embedding_dim": 2048, "num_blocks": 24, "num_heads": 16},
    "transformer-2.7b": _TRANSFORMER | {"embedding_dim": 2560, "num_blocks": 32, "num_heads": 20},
    "transformer-7b": _TRANSFORMER | {"embedding_dim": 4096, "num_blocks": 32, "num_heads": 32},
    # For a CPU, on bytes
    "transformer-cpu-0.7m": _BYTES | {"embedding_dim": 128, "num_blocks": 4, "feedforward_dim": 248},
    "transformer-cpu-1m": _BYTES | {"embedding_dim": 128, "num_blocks": 6, "feedforward_dim": 248},
    "transformer-cpu-3m": _BYTES | {"embedding_dim": 192, "num_blocks": 8, "feedforward_dim": 368},
    # For a CPU, on tokens
    "transformer-cpu-8.5m": _TRANSFORMER | {"vocab_size": 4096, "embedding_dim": 256, "num_blocks": 8, "num_heads": 4},
}
