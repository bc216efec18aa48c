"""The compute-optimal frontier of a surface, solved numerically with an architecture's own FLOPs.

The closed form N* = G (C / 6)^a holds for C = 6 N D alone, which is 23 % under to 37 % over the FLOPs of these models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize_scalar

from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.surface import Surface

FlopsPerToken = Callable[[Any], Any]
"""Training FLOPs of a token from the number of parameters; of an array one by one."""
SEARCHED = np.log((1e3, 1e14))
"""Logarithms of the parameters between which the best is searched."""
COARSE = 400
"""Sizes tried before the best is refined."""


class NoBestSizeError(ValueError):
    """A surface whose loss falls to an end of all sizes, as where one of its terms is zero."""


@dataclass(frozen=True)
class Optimum:
    """The best split of a budget."""

    flops: float
    """C."""
    params: float
    """N*."""
    tokens: float
    """D*."""
    loss: float
    """Loss at the optimum, in nats a token."""


def flops_from_points(points: Iterable[LossPoint]) -> FlopsPerToken:
    """Interpolate the FLOPs of a token between measured models, smoothly in both logarithms.

    Beyond the smallest and the largest model FLOPs are in proportion to parameters.
    """
    known: dict[float, list[float]] = {}
    for point in points:
        known.setdefault(point.params, []).append(point.flops_per_token or point.flops / point.tokens)
    sizes = sorted(known)
    log_n = np.log(sizes)
    log_ratio = np.log([np.mean(known[size]) / size for size in sizes])
    between = PchipInterpolator(log_n, log_ratio) if len(sizes) > 1 else lambda x: np.full_like(x, log_ratio[0])

    def flops_per_token(params: Any) -> Any:
        return params * np.exp(between(np.clip(np.log(params), log_n[0], log_n[-1])))

    return flops_per_token


def optimum(surface: Surface, flops_per_token: FlopsPerToken, flops: float) -> Optimum:
    """Find the parameters and tokens with the lowest loss at a budget.

    Args:
        surface: of the loss.
        flops_per_token: of the architecture.
        flops: C, the budget.

    Raises:
        NoBestSizeError: the surface has none.
    """

    def loss(log_n: Any) -> Any:
        params = np.exp(log_n)
        return surface.loss(params, flops / flops_per_token(params))

    params, lowest = _minimum(loss, f"The surface at {flops:.3g} FLOPs")
    return Optimum(flops, params, flops / float(flops_per_token(params)), lowest)


def flops_to_reach(surface: Surface, flops_per_token: FlopsPerToken, loss: float) -> float:
    """Find the least FLOPs with which a loss is reached, over all sizes; infinite where none reaches it.

    Args:
        surface: of the loss.
        flops_per_token: of the architecture.
        loss: to reach, in nats a token.

    Raises:
        NoBestSizeError: the surface has none.
    """
    if loss <= surface.E:
        return math.inf

    def log_flops(log_n: Any) -> Any:
        params = np.exp(log_n)
        left = (loss - surface.E) ** (1 / surface.gamma) - surface.A * params**-surface.alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            log_tokens = (np.log(surface.B) - np.log(left)) / surface.beta
            return np.where(left > 0, np.log(flops_per_token(params)) + log_tokens, np.inf)

    return math.exp(_minimum(log_flops, f"The surface at loss {loss:g}")[1])


def _minimum(function: Callable[[Any], Any], name: str) -> tuple[float, float]:
    """Parameters with the lowest value of a function of their logarithm, and that value."""
    grid = np.linspace(*SEARCHED, COARSE)
    lowest = int(np.argmin(function(grid)))
    if lowest in (0, COARSE - 1):
        raise NoBestSizeError(
            f"{name} has no best size: it improves all the way to {math.exp(grid[lowest]):.0e} parameters. Fit the "
            "surface to more sizes and token counts."
        )
    bracket = (grid[lowest - 1], grid[lowest + 1])
    found = minimize_scalar(function, bounds=bracket, method="bounded", options={"xatol": 1e-10})
    return math.exp(found.x), float(found.fun)
