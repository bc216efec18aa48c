"""xLSTMs. `xlstm-*` and `mlstm-*` have the mLSTM blocks of xLSTM-7B (arXiv 2503.13427), `xlstm-conv-*` and
`mlstm-conv-*` the same with a convolution; `xlstm-paper-*` those of the first paper (arXiv 2405.04517), where 7-1 at
the end is xLSTM[7:1]; `slstm-*` has sLSTM blocks alone."""

from __future__ import annotations

from typing import Any

_XLSTM: dict[str, Any] = {"family": "xlstm", "vocab_size": 50304}
_BLOCKS_7B = _XLSTM | {"pattern": "mlstm"}
_CONV = _XLSTM | {"pattern": "mlstm_conv"}

_PAPER = _XLSTM | {
    "mlstm_block": "mlstm_paper",
    "num_heads": 4,
    "norm": "layer",
    "norm_eps": 1e-5,
    "gate_soft_cap": None,
    "logit_soft_cap": None,
}
_PAPER_1_0 = _PAPER | {"pattern": "xlstm[1:0]"}
_PAPER_7_1 = _PAPER | {"pattern": "xlstm[7:1]"}
_SLSTM_OF_48 = {"slstm_positions": [3, 5, 7, 40, 42, 44]}

_BYTES = {"family": "xlstm", "vocab_size": 257, "num_heads": 4, "norm": "layer"}
_BYTES_MLSTM = _BYTES | {"pattern": "mlstm", "embedding_dim": 128, "num_blocks": 4}
_BYTES_SLSTM = _BYTES | {"pattern": "slstm"}
_BYTES_1_1 = _BYTES | {"pattern": "xlstm[1:1]"}
_BYTES_CONV_1_1 = _BYTES_1_1 | {"mlstm_block": "mlstm_conv"}
_BYTES_PAPER = _BYTES | {"mlstm_block": "mlstm_paper", "num_blocks": 6}

PRESETS: dict[str, dict[str, Any]] = {
    "xlstm-165m": _BLOCKS_7B | {"embedding_dim": 768, "num_blocks": 12, "num_heads": 4},
    "xlstm-400m": _BLOCKS_7B | {"embedding_dim": 1024, "num_blocks": 24, "num_heads": 4},
    "xlstm-830m": _BLOCKS_7B | {"embedding_dim": 1536, "num_blocks": 24, "num_heads": 4},
    "xlstm-1.3b": _BLOCKS_7B | {"embedding_dim": 2048, "num_blocks": 24, "num_heads": 4},
    "xlstm-2.7b": _BLOCKS_7B | {"embedding_dim": 2560, "num_blocks": 32, "num_heads": 5},
    "xlstm-7b": _BLOCKS_7B | {"embedding_dim": 4096, "num_blocks": 32, "num_heads": 8},
    "xlstm-conv-165m": _CONV | {"embedding_dim": 768, "num_blocks": 12, "num_heads": 4},
    "xlstm-conv-400m": _CONV | {"embedding_dim": 1024, "num_blocks": 24, "num_heads": 4},
    "xlstm-conv-1.3b": _CONV | {"embedding_dim": 2048, "num_blocks": 24, "num_heads": 4},
    "xlstm-conv-7b": _CONV | {"embedding_dim": 4096, "num_blocks": 32, "num_heads": 8},
    "xlstm-paper-125m-1-0": _PAPER_1_0 | {"embedding_dim": 768, "num_blocks": 24},
    "xlstm-paper-125m-7-1": _PAPER_7_1 | {"embedding_dim": 768, "num_blocks": 24, "slstm_positions": [3, 20]},
    "xlstm-paper-350m-1-0": _PAPER_1_0 | {"embedding_dim": 1024, "num_blocks": 48},
    "xlstm-paper-350m-7-1": _PAPER_7_1 | _SLSTM_OF_48 | {"embedding_dim": 1024, "num_blocks": 48},
    "xlstm-paper-760m-1-0": _PAPER_1_0 | {"embedding_dim": 1536, "num_blocks": 48},
    "xlstm-paper-760m-7-1": _PAPER_7_1 | _SLSTM_OF_48 | {"embedding_dim": 1536, "num_blocks": 48},
    "xlstm-paper-1.3b-1-0": _PAPER_1_0 | {"embedding_dim": 2048, "num_blocks": 48},
    "xlstm-paper-1.3b-7-1": _PAPER_7_1 | _SLSTM_OF_48 | {"embedding_dim": 2048, "num_blocks": 48},
    # For a CPU, on bytes
    "xlstm-cpu-0.7m": _BYTES_1_1 | {"embedding_dim": 128, "num_blocks": 4, "slstm_positions": [0, 2]},
    "xlstm-cpu-1m": _BYTES_1_1 | {"embedding_dim": 128, "num_blocks": 6, "slstm_positions": [0, 2, 4]},
    "xlstm-cpu-3m": _BYTES_1_1 | {"embedding_dim": 224, "num_blocks": 6, "slstm_positions": [0, 2, 4]},
    "xlstm-conv-cpu-0.7m": _BYTES_CONV_1_1 | {"embedding_dim": 128, "num_blocks": 4, "slstm_positions": [0, 2]},
    "xlstm-conv-cpu-1m": _BYTES_CONV_1_1 | {"embedding_dim": 128, "num_blocks": 6, "slstm_positions": [0, 2, 4]},
    "xlstm-conv-cpu-3m": _BYTES_CONV_1_1 | {"embedding_dim": 224, "num_blocks": 6, "slstm_positions": [0, 2, 4]},
    "xlstm-paper-cpu-1m-1-0": _BYTES_PAPER | {"pattern": "xlstm[1:0]", "embedding_dim": 152},
    "xlstm-paper-cpu-1m-1-1": _BYTES_PAPER
    | {"pattern": "xlstm[1:1]", "embedding_dim": 148, "slstm_positions": [0, 2, 4]},
    "xlstm-paper-cpu-3m-1-0": _BYTES_PAPER | {"pattern": "xlstm[1:0]", "embedding_dim": 260},
    "mlstm-cpu-0.7m": _BYTES_MLSTM | {"feedforward_dim": 248},
    "mlstm-cpu-1m": _BYTES_MLSTM | {"feedforward_dim": 456},
    "mlstm-conv-cpu-0.7m": _BYTES_MLSTM | {"pattern": "mlstm_conv", "feedforward_dim": 240},
    "mlstm-conv-cpu-1m": _BYTES_MLSTM | {"pattern": "mlstm_conv", "feedforward_dim": 452},
    "slstm-cpu-0.7m": _BYTES_SLSTM | {"embedding_dim": 128, "num_blocks": 6},
    "slstm-cpu-1m": _BYTES_SLSTM | {"embedding_dim": 168, "num_blocks": 5},
    # For a CPU, on tokens
    "xlstm-cpu-8.5m": _BLOCKS_7B | {"vocab_size": 4096, "embedding_dim": 256, "num_blocks": 8, "num_heads": 4},
}
