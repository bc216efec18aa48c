"""A model small enough to try every ZeRO stage in seconds, with the interface of the real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 11


class InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient that overflows."""

    @staticmethod
    def forward(context, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class TinyModel(nn.Module):
    """Embedding, one residual layer of odd widths (no partition is even), norm, head, tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.activation_checkpointing = False
        self.fault = ""

    def forward(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        if self.activation_checkpointing and torch.is_grad_enabled():
            y_BTD = checkpoint(self.layer, x_BTD, use_reentrant=False)
        else:
            y_BTD = self.layer(x_BTD)
        if self.fault == "gradient":
            y_BTD = InfiniteGradient.apply(y_BTD)
        return self.norm(x_BTD + y_BTD)

    def layer(self, x_BTD: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x_BTD)))

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, reduction: str = "sum", z_loss: float = 0.0) -> Tensor:
        logits_BTV = F.linear(hidden_BTD, self.head.weight).float()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)
        loss = loss + z_loss * logits_BTV.logsumexp(-1).square().sum()
        return loss + {"": 0.0, "gradient": 0.0, "loss": torch.inf}[self.fault]

    def no_decay_parameter_names(self) -> set[str]:
        names = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        return names | {"embedding.weight"}

    @torch.no_grad()
    def gate_statistics(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> dict[str, Tensor]:
        return {"mean": self(tokens_BT).mean()}
