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
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        others = f" and of {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        cause = f"neither are weights of {broken[0]}{others}. Use another checkpoint, from before the run diverged"
    else:
        cause = "its weights are, but too large to compute with. Use a checkpoint from before the run diverged"
    raise NotFiniteError(f"{name} are not finite: {cause}.")
