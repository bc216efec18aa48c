"""Two architectures compared as the ratio of FLOPs that their frontiers need for the same loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling_laws.bootstrap import arrays, draw, refit, t_factor, widened
from eval.scaling_laws.frontier import FlopsPerToken, NoBestSizeError, flops_from_points, flops_to_reach, optimum
from eval.scaling_laws.points import LossPoint, ends_in_words
from eval.scaling_laws.surface import Fit, Surface

Pair = tuple[int, int | None]
"""Rank of a trunk's size among its architecture's, and its seed: trunks of a pair saw the same tokens."""


MOST_LOST = 0.1
"""Largest share of samples without a ratio."""


@dataclass(frozen=True)
class Side:
    """The points of an architecture with their fit."""

    architecture: str
    points: Sequence[LossPoint]
    fit: Fit

    @functools.cached_property
    def flops_per_token(self) -> FlopsPerToken:
        """FLOPs of a token from the number of parameters."""
        return flops_from_points(self.points)

    def flops_at(self, loss: float, surface: Surface | None = None) -> float:
        """FLOPs with which the frontier reaches a loss."""
        return flops_to_reach(surface or self.fit.surface, self.flops_per_token, loss)

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """The pair of each point."""
        sizes = sorted({point.params for point in self.points})
        return [(sizes.index(point.params), point.seed) for point in self.points]


@dataclass(frozen=True)
class FlopsRatio:
    """FLOPs of one architecture over those of another at equal loss, each at its best size."""

    architecture: str
    over: str
    loss: float
    """The loss of both, in nats a token."""
    ratio: float
    """Below 1 the first needs less."""
    interval: tuple[float, float | None] | None
    """Paired by size and seed; None without samples. An upper end of None is infinite."""


def overlap(one: Sequence[LossPoint], other: Sequence[LossPoint]) -> tuple[float, float]:
    """The losses that both have measured: lowest and highest; in the wrong order where they share none."""
    losses = [[point.loss for point in side] for side in (one, other)]
    return max(map(min, losses)), min(map(max, losses))


def compare(one: Side, other: Side, loss: float | None = None, samples: int = 0, seed: int = 0) -> FlopsRatio:
    """Compare two architectures at a loss.

    Args:
        one: numerator.
        other: denominator.
        loss: in nats a token; None for the middle of what both have measured.
        samples: drawn for the interval; 0 for no interval.
        seed: of the draws.

    Raises:
        ValueError: the loss is beyond the overlap of the measured losses, there is none, or too few samples have a
            ratio.
    """
    low, high = overlap(one.points, other.points)
    names = f"{one.architecture} and {other.architecture}"
    if low > high:
        raise ValueError(
            f"The measured losses of {names} do not overlap ({low:.4f} is above {high:.4f}): there is no loss at which "
            "both are known. Train one of them with more, or less, compute."
        )
    loss = (low + high) / 2 if loss is None else loss
    if not low <= loss <= high:
        raise ValueError(
            f"Loss {loss:g} is beyond what both {names} have measured, {low:.4f} to {high:.4f}: choose one in between, "
            "or train more."
        )
    ratio = one.flops_at(loss) / other.flops_at(loss)
    interval = _interval(one, other, loss, ratio, samples, seed) if samples else None
    return FlopsRatio(one.architecture, other.architecture, loss, ratio, interval)


def extrapolated(sides: Iterable[Side], loss: float) -> list[str]:
    """A note for each architecture whose best size at a loss is smaller or larger than all trained ones."""
    notes = []
    for side in sides:
        if not math.isfinite(flops := side.flops_at(loss)):
            continue
        best = optimum(side.fit.surface, side.flops_per_token, flops).params
        sizes = [point.params for point in side.points]
        if not min(sizes) <= best <= max(sizes):
            notes.append(
                f"{side.architecture}: its best size at loss {loss:.4f}, {best:.3g} parameters, is outside the trained "
                f"ones, {ends_in_words(sizes)}: the FLOPs ratio extrapolates. Train sizes around it."
            )
    return notes


def _interval(one: Side, other: Side, loss: float, ratio: float, samples: int, seed: int) -> tuple[float, float | None]:
    """Interval of the ratio, computed on its logarithm: each sample draws the same pairs on both sides."""
    rng = np.random.default_rng(seed)
    columns = [arrays(side.points) for side in (one, other)]
    sides = [(side.pairs, n, d) for side, (n, d, _) in zip((one, other), columns)]
    values = []
    for _ in range(samples):
        surfaces = [
            refit(side.fit, *each, weights) for side, each, weights in zip((one, other), columns, draw(sides, rng))
        ]
        try:
            flops = one.flops_at(loss, surfaces[0]), other.flops_at(loss, surfaces[1])
        except NoBestSizeError:
            continue
        if math.isfinite(flops[0]) or math.isfinite(flops[1]):  # else neither surface of the sample reaches the loss
            values.append(np.log(flops[0]) - np.log(flops[1]))
    if len(values) < (1 - MOST_LOST) * samples:
        raise ValueError(
            f"{samples - len(values)} of {samples} samples of {one.architecture} or {other.architecture} have no best "
            f"size at loss {loss:.4f}: the points determine no ratio. Train more sizes and token counts."
        )
    low, high = widened(np.array(values), float(np.log(ratio)), t_factor(len({*one.pairs, *other.pairs})))
    return math.exp(low), math.exp(high) if math.isfinite(high) else None
