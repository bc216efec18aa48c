"""Approach 2: parabolas of the loss over log N and over log D at each budget of compute, and lines through the minima.

The parabola is biased where alpha and beta differ or a grid is wide: on the published surface of Chinchilla a grid of
16 times to each side puts D* 5 % too low and N* 5 % too high. Therefore grids are checked, and the fitted surface's
frontier stands beside the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.surface import Floats

SAME_BUDGET = 1.1
"""Largest ratio of the compute of two points that count as one budget."""
WIDEST = 4.0
"""Largest over smallest N of a grid from which on the parabola's bias is worth a warning."""
OFF_CENTER = 0.3
"""Distance of the minimum from the middle of the grid, in widths of the grid, from which on it is."""


@dataclass(frozen=True)
class Parabola:
    """L = curvature (log10 x - log10 minimum)^2 + loss."""

    minimum: float
    """x of the lowest loss."""
    loss: float
    """Lowest loss."""
    curvature: float
    """Curvature over log10 x; where it is not above 0 the parabola has no minimum."""

    def at(self, x: Floats) -> Floats:
        """The loss at x."""
        return self.loss + self.curvature * np.log10(x / self.minimum) ** 2


@dataclass(frozen=True)
class Budget:
    """The points of one budget of compute, with their parabolas."""

    flops: float
    """Geometric mean of the points' compute."""
    points: list[LossPoint]
    over_params: Parabola
    over_tokens: Parabola
    warnings: list[str]
    """Reasons to distrust the minimum."""


@dataclass(frozen=True)
class Approach2:
    """Minima of all budgets, and N* = 10^n0 C^a, D* = 10^d0 C^b."""

    budgets: list[Budget]
    a: float
    n0: float
    b: float
    d0: float

    @property
    def warnings(self) -> list[str]:
        """Warnings of all budgets."""
        return [each for budget in self.budgets for each in budget.warnings]


def fit_parabola(x: Floats, loss: Floats) -> Parabola:
    """Fit a parabola of the loss over log10 x by least squares. Without curvature its minimum is NaN.

    Args:
        x: parameters or tokens, at least 3 different values.
        loss: of each, in nats a token.
    """
    log_x = np.log10(x)
    center = log_x.mean()
    square, slope, constant = np.polyfit(log_x - center, loss, 2)
    vertex = -slope / (2 * square) if square else np.nan
    lowest = constant - slope**2 / (4 * square) if square else np.nan
    with np.errstate(over="ignore"):
        return Parabola(float(10 ** (center + vertex)), float(lowest), float(square))


def fit_budgets(points: Sequence[LossPoint]) -> Approach2:
    """Fit the points of one architecture by Approach 2.

    Raises:
        ValueError: fewer than 2 budgets have 3 sizes and a minimum.
    """
    budgets = [_budget(group) for group in group_by_budget(points) if len({each.params for each in group}) >= 3]
    sound = [each for each in budgets if each.over_params.curvature > 0 and each.over_tokens.curvature > 0]
    if len(sound) < 2:
        raise ValueError(
            f"{len(sound)} budgets of compute have 3 sizes and a minimum between them; IsoFLOP needs at least 2. "
            f"Points count as one budget up to {SAME_BUDGET - 1:.0%} apart: design the runs with --mode isoflop, or "
            "fit a surface with --form chinchilla."
        )
    log_c = np.log10([each.flops for each in sound])
    a, n0 = np.polyfit(log_c, np.log10([each.over_params.minimum for each in sound]), 1)
    b, d0 = np.polyfit(log_c, np.log10([each.over_tokens.minimum for each in sound]), 1)
    return Approach2(budgets, float(a), float(n0), float(b), float(d0))


def group_by_budget(points: Sequence[LossPoint]) -> list[list[LossPoint]]:
    """Split points into groups of nearly equal compute, the smallest first."""
    groups: list[list[LossPoint]] = []
    for point in sorted(points, key=lambda each: each.flops):
        if groups and point.flops <= groups[-1][0].flops * SAME_BUDGET:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _budget(points: list[LossPoint]) -> Budget:
    n, d, loss, flops = np.array([(each.params, each.tokens, each.loss, each.flops) for each in points]).T
    budget = float(np.exp(np.log(flops).mean()))
    over_params, over_tokens = fit_parabola(n, loss), fit_parabola(d, loss)
    return Budget(budget, points, over_params, over_tokens, _warnings(f"Budget {budget:.3g}", n, loss, over_params))


def _warnings(name: str, n: Floats, loss: Floats, parabola: Parabola) -> list[str]:
    low, high = n.min(), n.max()
    found = []
    best = n[np.argmin(loss)]
    if parabola.curvature <= 0 or not low < parabola.minimum < high or best in (low, high):
        at = f", {parabola.minimum:.3g}," if parabola.curvature > 0 else ""
        end = "smaller" if loss[np.argmin(n)] < loss[np.argmax(n)] else "larger"
        found.append(
            f"{name}: the minimum{at} is not bracketed by its sizes ({low:.3g} to {high:.3g}): add {end} ones."
        )
    else:
        place = np.log(parabola.minimum / np.sqrt(low * high)) / np.log(high / low)
        if abs(place) > OFF_CENTER:
            found.append(
                f"{name}: the minimum {parabola.minimum:.3g} is {abs(place):.2f} grid widths off the middle of its "
                f"sizes, over {OFF_CENTER}: the parabola is biased; center the grid on it."
            )
    if high / low > WIDEST * (1 + 1e-9):
        found.append(
            f"{name}: its sizes span {high / low:.3g} times, over {WIDEST:g}: the parabola is biased; prefer the "
            "frontier of the surface, or a narrower grid."
        )
    return found
