"""AdamW that decays matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from xlstm_lm.base.fields import NonNegative, Positive, PositiveRatio, Share
from xlstm_lm.training.optimizer.config import Group, OptimizerConfig


@dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    """Optimizer."""
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

    fewest_state_tensors: ClassVar[int] = 2

    def groups(self, shapes: Mapping[str, torch.Size], no_decay: set[str]) -> list[Group]:
        """Decayed parameters, then the others."""
        keys = ("exp_avg", "exp_avg_sq")
        decayed = tuple(name for name in shapes if name not in no_decay)
        kept = tuple(name for name in shapes if name in no_decay)
        return [
            Group(decayed, keys, {"weight_decay": self.weight_decay}),
            Group(kept, keys, {"weight_decay": 0.0}),
        ]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """torch's fused AdamW, which updates CPU tensors as well and compiles nothing."""
        return torch.optim.AdamW(groups, lr=0.0, betas=tuple(self.betas), eps=self.eps, fused=True)
