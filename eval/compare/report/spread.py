"""How far apart two models are, beside how far apart the seeds of one model are.

Runs of one seed see the same tokens in the same order, so two models are compared seed by seed: what the order of the
data does to both alike drops out of the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eval.compare.results import ModelResult, Results, Run

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 0.975 quantiles of Student's t with 1 to 10 degrees of freedom; more take the last, a little too wide."""


@dataclass(frozen=True)
class Spread:
    """Of a value over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    count: int


@dataclass(frozen=True)
class Difference:
    """Of two models over the seeds they share."""

    mean: float
    half_width: float | None
    """Of the 95 % confidence interval; None for one seed."""
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)

    @property
    def is_beyond_spread(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Quantity:
    """A number that ranks runs; lower is better."""

    name: str
    short: str
    """For the axis of a picture."""
    decimals: int
    of: Callable[[Run], float | None]


def _test_bits(run: Run) -> float | None:
    return run.tested and run.tested.bits_per_byte


def _test_loss(run: Run) -> float | None:
    return run.tested and run.tested.loss


def _validation_bits(run: Run) -> float | None:
    return run.curve[-1].bits_per_byte if run.curve else None


def _validation_loss(run: Run) -> float | None:
    return run.curve[-1].loss if run.curve else None


VALIDATION_BITS = Quantity(
    "bits per byte on the validation documents", "bits per byte, validation", 4, _validation_bits
)
VALIDATION_LOSS = Quantity(
    "nats per token on the validation documents", "nats per token, validation", 4, _validation_loss
)
QUANTITIES = (
    Quantity("bits per byte on the test documents", "bits per byte, test", 4, _test_bits),
    Quantity("nats per token on the test documents", "nats per token, test", 4, _test_loss),
    VALIDATION_BITS,
    VALIDATION_LOSS,
)


def deciding_quantity(results: Results) -> Quantity:
    """The first of `QUANTITIES` that a finished run has."""
    finished = [run for model in results.models for run in model.runs if run.status == "finished"]
    return next((each for each in QUANTITIES if any(each.of(run) is not None for run in finished)), QUANTITIES[0])


def values_by_seed(model: ModelResult, of: Callable[[Run], float | None]) -> dict[int, float]:
    """The value of each finished run that has a finite one."""
    found = {run.seed: of(run) for run in model.runs if run.status == "finished"}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Mean of first - second over the seeds that both have, with its t interval; None where they share no seed."""
    differences = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
    found = spread(differences)
    if found is None:
        return None
    half_width = None
    if found.deviation is not None:
        half_width = T_975[min(found.count - 1, len(T_975)) - 1] * found.deviation / math.sqrt(found.count)
    return Difference(found.mean, half_width, found.count)
