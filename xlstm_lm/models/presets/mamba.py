"""Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060) of the sizes of the xLSTMs."""

from __future__ import annotations

from typing import Any

_MAMBA1: dict[str, Any] = {"family": "mamba", "version": 1, "vocab_size": 50304}
_MAMBA2 = _MAMBA1 | {"version": 2}
_BYTES1, _BYTES2 = _MAMBA1 | {"vocab_size": 257}, _MAMBA2 | {"vocab_size": 257}

PRESETS: dict[str, dict[str, Any]] = {
    "mamba1-165m": _MAMBA1 | {"embedding_dim": 768, "num_blocks": 23},
    "mamba1-400m": _MAMBA1 | {"embedding_dim": 1024, "num_blocks": 46},
    "mamba1-830m": _MAMBA1 | {"embedding_dim": 1536, "num_blocks": 46},
    "mamba1-1.3b": _MAMBA1 | {"embedding_dim": 2048, "num_blocks": 46},
    "mamba1-2.7b": _MAMBA1 | {"embedding_dim": 2560, "num_blocks": 61},
    "mamba1-7b": _MAMBA1 | {"embedding_dim": 4096, "num_blocks": 61},
    "mamba2-165m": _MAMBA2 | {"embedding_dim": 768, "num_blocks": 23},
    "mamba2-400m": _MAMBA2 | {"embedding_dim": 1024, "num_blocks": 46},
    "mamba2-830m": _MAMBA2 | {"embedding_dim": 1536, "num_blocks": 47},
    "mamba2-1.3b": _MAMBA2 | {"embedding_dim": 2048, "num_blocks": 47},
    "mamba2-2.7b": _MAMBA2 | {"embedding_dim": 2560, "num_blocks": 63},
    "mamba2-7b": _MAMBA2 | {"embedding_dim": 4096, "num_blocks": 63},
    # For a CPU, on bytes
    "mamba1-cpu-0.7m": _BYTES1 | {"embedding_dim": 112, "num_blocks": 7, "state_dim": 20},
    "mamba1-cpu-1m": _BYTES1 | {"embedding_dim": 128, "num_blocks": 8, "state_dim": 20},
    "mamba1-cpu-3m": _BYTES1 | {"embedding_dim": 192, "num_blocks": 11, "state_dim": 22},
    "mamba2-cpu-0.7m": _BYTES2 | {"embedding_dim": 112, "num_blocks": 7, "state_dim": 64, "head_dim": 16},
    "mamba2-cpu-1m": _BYTES2 | {"embedding_dim": 128, "num_blocks": 8, "state_dim": 72, "head_dim": 64},
    "mamba2-cpu-3m": _BYTES2 | {"embedding_dim": 192, "num_blocks": 11, "state_dim": 88, "head_dim": 64},
    # For a CPU, on tokens
    "mamba1-cpu-8.5m": _MAMBA1 | {"vocab_size": 4096, "embedding_dim": 280, "num_blocks": 12},
    "mamba2-cpu-8.5m": _MAMBA2 | {"vocab_size": 4096, "embedding_dim": 256, "num_blocks": 14},
}
