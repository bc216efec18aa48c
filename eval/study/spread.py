"""Spread of a value over seeds, and the difference of two models with its interval.

Runs of one seed see the same tokens in the same order, so two models are compared seed by seed: the effect of the data
order that both share drops out of the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""0.975 quantiles of Student's t with 1 to 10 degrees of freedom; more degrees use the last, slightly too wide."""


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of a value over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    count: int

    @property
    def band(self) -> tuple[float, float]:
        """One deviation to each side of the mean."""
        return self.mean - (self.deviation or 0.0), self.mean + (self.deviation or 0.0)


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models over the seeds they share."""

    mean: float
    half_width: float | None
    """Half the 95 % confidence interval; None for one seed."""
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + (self.half_width or 0.0)

    @property
    def is_beyond_spread(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample deviation; None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Mean of first - second over the seeds that both have, with its t interval; None where they share no seed."""
    found = spread([first[seed] - second[seed] for seed in first.keys() & second.keys()])
    if found is None:
        return None
    half_width = None
    if found.deviation is not None:
        half_width = T_975[min(found.count - 1, len(T_975)) - 1] * found.deviation / math.sqrt(found.count)
    return Difference(found.mean, half_width, found.count)
