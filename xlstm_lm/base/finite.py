"""One message where the numbers of a model are not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """A model has computed infinity or NaN; the message says which numbers and why."""


def check_finite(values: Tensor, model: nn.Module, name: str) -> None:
    """Refuse numbers of a model, called `name` in the message, of which some are infinite or NaN.

    Raises:
        NotFiniteError: some are.
    """
    if torch.isfinite(values).all():
        return
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    weights = f"its weights are not finite ({listed(broken)})" if broken else "its weights are too large, or wrong"
    raise NotFiniteError(f"{name} are not finite: {weights}. Use a checkpoint from before the run diverged.")


def listed(names: list[str]) -> str:
    """The first of some tensors, and how many there are besides."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
