"""Step sizes and decays, which both Mambas compute and initialize alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4  # of dt at the start, as published


def positive_steps(step: Tensor, bias: Tensor) -> Tensor:
    """Step sizes dt above 0, in float32 at least, because 16 bits would lose small ones."""
    return F.softplus(_add(step, bias))


class StepLinear(nn.Linear):
    """Linear layer that adds its bias in float32 at least: its softplus are the step sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return _add(F.linear(x, self.weight), self.bias)


def _add(step: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.promote_types(step.dtype, torch.float32)
    return step.to(dtype) + bias.to(dtype)


def negative_decay(log_decay: Tensor) -> Tensor:
    """Rates of decay below 0, in float32 at least."""
    return -torch.exp(log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)))


def init_step_bias(bias: Tensor) -> None:
    """Draw steps between 0.001 and 0.1, evenly in their logarithm, and set the bias to their inverse softplus."""
    step = torch.empty_like(bias).uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP))
    step = step.exp().clamp_min(STEP_FLOOR)
    bias.copy_(step + torch.log(-torch.expm1(-step)))
