"""Mixed blocks, and single mixers that have no family of their own, of the sizes of the xLSTMs."""

from __future__ import annotations

from typing import Any

_GATED_DELTA = {"family": "hybrid", "pattern": "gated_delta", "num_heads": 6, "logit_soft_cap": None}
_GATED_DELTA_BYTES = _GATED_DELTA | {"num_heads": 4, "embedding_dim": 128, "vocab_size": 257}

PRESETS: dict[str, dict[str, Any]] = {
    "gated-delta-165m": _GATED_DELTA | {"embedding_dim": 768, "num_blocks": 12, "feedforward_dim": 1600},
    "gated-delta-400m": _GATED_DELTA | {"embedding_dim": 1024, "num_blocks": 24, "feedforward_dim": 2048},
    "gated-delta-1.3b": _GATED_DELTA | {"embedding_dim": 2048, "num_blocks": 24, "feedforward_dim": 4160},
    "gated-delta-cpu-0.7m": _GATED_DELTA_BYTES | {"num_blocks": 4, "feedforward_dim": 156},
    "gated-delta-cpu-1m": _GATED_DELTA_BYTES | {"num_blocks": 5, "feedforward_dim": 240},
}
