"""Small models whose memory matters: weights large enough that what was read long ago still moves the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_lm import hub
from xlstm_lm.data import TokenizerConfig, build_tokenizer
from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMForCausalLM
from xlstm_lm.models import XLSTMConfig, build_model

MIXED = ["mlstm", "slstm", "mlstm_paper"]
SMALL: dict[str, Any] = {"vocab_size": 261, "embedding_dim": 32, "num_blocks": 3, "num_heads": 2, "pattern": MIXED}
STOCK: dict[str, Any] = {"vocab_size": 261, "embedding_dim": 128, "num_blocks": 2, "num_heads": 2, "pattern": "mlstm"}
"""Fields of a model that transformers' own `xlstm` can hold."""


@torch.no_grad()
def make_model(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build_model(XLSTMConfig(**(SMALL | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3 / (parameter.shape[-1] / 32) ** 0.5)
    return model


def make_trained(folder: Path, **changes: Any) -> hub.TrainedModel:
    """A model of xlstm-lm, and the byte tokenizer in `folder`."""
    build_tokenizer(TokenizerConfig()).save(folder / "tokenizer")
    model = make_model(**changes)
    return hub.TrainedModel(model.eval(), folder)


def make_pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[XLSTMLMForCausalLM, torch.nn.Module]:
    """The same model as transformers takes one, and ours, which is what it is held to."""
    model = make_model(**changes)
    wrapped = XLSTMLMForCausalLM(XLSTMLMConfig(**(SMALL | changes)))
    wrapped.model.load_state_dict(model.state_dict(), strict=False)
    wrapped.lm_head.load_state_dict(model.head.state_dict())
    return wrapped.to(dtype).eval(), model.to(dtype).eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2))


def logits(model: torch.nn.Module, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> Tensor:
    return model.logits(model(tokens_BT, resets_BT))
