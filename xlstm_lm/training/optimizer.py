"""AdamW that decays matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices other than embeddings; norms, biases and embeddings are never decayed."""
    gradient_clip: float = 0.5
    """Largest norm of the whole gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be greater than 0.")
        for name in ("weight_decay", "gradient_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; it must be two numbers of at least 0 and below 1.")


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
