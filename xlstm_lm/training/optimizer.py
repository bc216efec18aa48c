"""AdamW that decays matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from xlstm_lm.base.fields import NonNegative, Positive, PositiveRatio, Share, check_fields


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101)."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveRatio = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decay of matrices other than embeddings; norms, biases and embeddings are never decayed."""
    gradient_clip: NonNegative = 0.5
    """Largest norm of the whole gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")


def build_optimizer(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], no_decay: set[str]
) -> torch.optim.AdamW:
    """AdamW over two groups, decayed and not, with a learning rate of 0 until the loop sets one.

    Raises:
        ValueError: `no_decay` names a parameter that there is not.
    """
    named_parameters = list(named_parameters)
    unknown = no_decay - {name for name, _ in named_parameters}
    if unknown:
        raise ValueError(f"no_decay_parameter_names() names {sorted(unknown)}, which the model does not have.")
    decayed = [parameter for name, parameter in named_parameters if name not in no_decay]
    kept = [parameter for name, parameter in named_parameters if name in no_decay]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=tuple(config.betas), eps=config.eps, fused=True
    )
