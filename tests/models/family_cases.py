"""A small model of every family and kind of block, and packed rows to run it on."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.models import (
    HybridConfig,
    LSTMConfig,
    MambaConfig,
    ModelConfig,
    TransformerConfig,
    XLSTMConfig,
    build_model,
)
from xlstm_lm.models.language_model import LanguageModel

SHAPE = {"embedding_dim": 32, "num_blocks": 1, "vocab_size": 61}
CONFIGS: dict[str, ModelConfig] = {
    "mlstm": XLSTMConfig(**SHAPE, num_heads=2, pattern="mlstm"),
    "mlstm_sigmoid_gate": XLSTMConfig(**SHAPE, num_heads=2, pattern="mlstm", input_gate="sigmoid"),
    "mlstm_conv": XLSTMConfig(**SHAPE, num_heads=2, pattern="mlstm_conv"),
    "mlstm_paper": XLSTMConfig(**SHAPE, num_heads=2, pattern="mlstm_paper"),
    "mlstm_chunkwise": XLSTMConfig(**SHAPE, num_heads=2, pattern="mlstm", mlstm_backend="chunkwise", chunk_length=1),
    "slstm": XLSTMConfig(**SHAPE, num_heads=2, pattern="slstm"),
    "slstm_batched": XLSTMConfig(**SHAPE, num_heads=2, pattern="slstm", slstm_backend="batched"),
    "mixed": XLSTMConfig(**SHAPE | {"num_blocks": 3}, num_heads=2, pattern=["mlstm", "slstm", "mlstm_paper"]),
    "transformer": TransformerConfig(**SHAPE, num_heads=4, num_key_value_heads=2),
    "mamba1": MambaConfig(**SHAPE, version=1, state_dim=4),
    "mamba2": MambaConfig(**SHAPE, head_dim=16, state_dim=8),
    "gated_delta": HybridConfig(**SHAPE, num_heads=2, pattern="gated_delta"),
    "lstm": LSTMConfig(**SHAPE, layer_norm=True),
    "lstm_peepholes": LSTMConfig(**SHAPE, peepholes=True),
    "gru": LSTMConfig(**SHAPE, cell="gru"),
    "rnn": LSTMConfig(**SHAPE, cell="rnn"),
}


def make_model(name: str) -> LanguageModel:
    """The model in float32, moved away from its initialization, where whole paths are 0."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_rows(B: int = 2, T: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, resets and targets, (B, T) each: several documents in the first row, one that goes on in the others."""
    tokens_BT, targets_BT = torch.randint(0, SHAPE["vocab_size"], (2, B, T)).unbind(0)
    resets_BT = torch.zeros(B, T, dtype=torch.bool)
    resets_BT[0, [0, 3, 4, 15]] = True
    return tokens_BT, resets_BT, targets_BT
