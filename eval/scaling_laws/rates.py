"""The learning rate over size and horizon: fitted to a sweep at the smallest sizes, lr = c N^a T^-0.3.

The horizon's exponent is that of Marin's Delphi, whose first law without it was wrong by 30 times beyond its data. Two
sizes would determine a exactly and check nothing, thus a is 0 for fewer than three.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling_laws.points import LossPoint

HORIZON_EXPONENT = -0.3
"""Exponent of the tokens."""
FURTHEST = 30.0
"""Largest ratio of a size to the largest one of the sweep for which the law is used without --force."""


@dataclass(frozen=True)
class RateLaw:
    """lr = scale N^exponent T^HORIZON_EXPONENT."""

    scale: float
    exponent: float
    largest: float
    """Parameters of the largest model of the sweep."""
    notes: list[str]

    def rate(self, params: float, tokens: float, force: bool = False) -> float:
        """Compute the learning rate of a run.

        Args:
            params: N of the model.
            tokens: T, the longest horizon of its trunk.
            force: whether sizes far beyond the sweep are allowed.

        Raises:
            ValueError: the size is over 30 times the largest of the sweep.
        """
        if params > FURTHEST * self.largest and not force:
            raise ValueError(
                f"{params:,.0f} parameters are {params / self.largest:.3g} times the largest size of the sweep "
                f"({self.largest:,.0f}), over {FURTHEST:g} times: sweep a larger size, or accept the risk with --force."
            )
        return self.scale * params**self.exponent * tokens**HORIZON_EXPONENT


def fit_rates(points: Sequence[LossPoint]) -> RateLaw:
    """Fit the law to the sweep of one architecture: the best rate of each size is the minimum of a parabola in log lr.

    Args:
        points: of sizes, each at one number of tokens and at least two learning rates; other points are ignored.

    Raises:
        ValueError: no size has several learning rates.
    """
    groups: dict[tuple[float, float], list[LossPoint]] = defaultdict(list)
    for point in points:
        if point.learning_rate is not None:
            groups[point.params, point.tokens].append(point)
    swept = {key: group for key, group in groups.items() if len({each.learning_rate for each in group}) > 1}
    if not swept:
        raise ValueError(
            "The table has no size at several learning rates: design a sweep with --lr-sweep 3, run and collect it."
        )
    notes: list[str] = []
    best = {key: _best_rate(key, group, notes) for key, group in swept.items()}
    sizes, horizons = np.array(list(best)).T
    wanted = np.log(list(best.values())) - HORIZON_EXPONENT * np.log(horizons)
    if len(set(sizes)) >= 3:
        exponent, constant = np.polyfit(np.log(sizes), wanted, 1)
    else:
        exponent, constant = 0.0, float(np.mean(wanted))
        notes.append(f"{len(set(sizes))} sizes were swept: the learning rate depends on the horizon alone.")
    return RateLaw(math.exp(constant), float(exponent), float(max(sizes)), notes)


def _best_rate(key: tuple[float, float], group: list[LossPoint], notes: list[str]) -> float:
    rates = np.log([each.learning_rate for each in group])
    loss = np.array([each.loss for each in group])
    lowest, ends = rates[np.argmin(loss)], (rates.min(), rates.max())
    if len(set(rates)) >= 3:
        square, slope, _ = np.polyfit(rates - lowest, loss, 2)
        if square > 0 and ends[0] < (vertex := lowest - slope / (2 * square)) < ends[1]:
            return math.exp(vertex)
    if lowest in ends:
        notes.append(
            f"{key[0]:,.0f} parameters: the best learning rate, {math.exp(lowest):.3g}, is at the end of its sweep; a "
            "wider one may do better."
        )
    return math.exp(lowest)
