"""Intervals of a fit: by drawing trunks again, and from the spread of seeds.

Branches of a trunk share its noise, so trunks are drawn, not points. The quantiles are widened by Student's t of the
number of trunks, because few of them vary less than their population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from eval.scaling_laws.huber import fit_huber
from eval.scaling_laws.points import LossPoint, repeated
from eval.scaling_laws.surface import Fit, Floats, Surface, check_enough
from eval.scaling_laws.vpnls import fit_vpnls

LEVEL = 0.9
"""Share of intervals that are to hold the true value."""
FEW_SIZES = 5
"""Number of sizes below which intervals are too narrow: with 4 about 80 % of those of 90 % hold the true value."""
FEWEST = 4
"""Trunks without which there is no interval."""


@dataclass(frozen=True)
class Samples:
    """Surfaces fitted to data drawn again."""

    surfaces: list[Surface]
    widening: float
    """Factor of the distance of a quantile from the estimate."""

    def interval(self, value: Callable[[Surface], float], estimate: float, level: float = LEVEL) -> tuple[float, float]:
        """Compute the interval of a value that follows from a surface.

        Args:
            value: computed from each surface.
            estimate: the value of the surface fitted to all data.
            level: share of intervals that are to hold the true value.

        Returns:
            lower and upper end; both NaN where a sample's value is NaN.
        """
        return widened(np.array([value(each) for each in self.surfaces]), estimate, self.widening, level)


def widened(values: Floats, estimate: float, widening: float, level: float = LEVEL) -> tuple[float, float]:
    """Quantiles of values, their distance from an estimate multiplied by a factor."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    low, high = min(low, estimate), max(high, estimate)
    return float(estimate + widening * (low - estimate)), float(estimate + widening * (high - estimate))


def resample_trunks(points: Sequence[LossPoint], fit: Fit, count: int, seed: int = 0) -> Samples:
    """Fit surfaces to trunks drawn with replacement, by the method of the fit to all points.

    Args:
        points: of one architecture.
        fit: of all points.
        count: samples.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than `FEWEST` trunks.
    """
    n, d, loss = arrays(points)
    trunks = [point.group for point in points]
    rng = np.random.default_rng(seed)
    surfaces = [refit(fit, n, d, loss, draw([(trunks, n, d)], rng)[0]) for _ in range(count)]
    return Samples(surfaces, t_factor(len(set(trunks))))


def t_factor(trunks: int, level: float = LEVEL) -> float:
    """Quantile of Student's t with one degree of freedom less than trunks, over the normal one."""
    return float(t.ppf((1 + level) / 2, max(trunks - 1, 1)) / norm.ppf((1 + level) / 2))


def draw(sides: Sequence[tuple[Sequence[Hashable], Floats, Floats]], rng: np.random.Generator) -> list[Floats]:
    """Draw groups with replacement, again until the points of each side determine a surface.

    Args:
        sides: of each, the group, the parameters and the tokens of every point. Sides share their groups.
        rng: of the draw.

    Returns:
        the weights of the points of each side: how often their group was drawn.

    Raises:
        ValueError: there are fewer than `FEWEST` groups.
    """
    groups = list(dict.fromkeys(group for of_points, _, _ in sides for group in of_points))
    if len(groups) < FEWEST:
        raise ValueError(
            f"{len(groups)} trunks are too few to draw from; intervals need at least {FEWEST}. Train more sizes or "
            "seeds, or fit with --samples 0 for no intervals."
        )
    place = {group: number for number, group in enumerate(groups)}
    of_points = [np.array([place[group] for group in each]) for each, _, _ in sides]
    while True:
        drawn = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups)).astype(float)
        weights = [drawn[each] for each in of_points]
        if all(_determine(each, params, tokens) for each, (_, params, tokens) in zip(weights, sides)):
            return weights


def _determine(weights: Floats, params: Floats, tokens: Floats) -> bool:
    """Whether the points with a weight determine a surface."""
    try:
        check_enough(params[weights > 0], tokens[weights > 0])
    except ValueError:
        return False
    return True


def seed_deviation(points: Iterable[LossPoint]) -> tuple[float, int] | None:
    """Relative standard deviation of the loss over seeds, pooled, and its degrees of freedom.

    It is that of points that differ in the seed alone. Without such points, as in a table of means over seeds, it is
    that of the column loss_std, each value with one degree of freedom. None without either.
    """
    points = list(points)
    groups = [np.log([point.loss for point in group]) for group in repeated(points)]
    variances = [(float(each.var(ddof=1)), len(each) - 1) for each in groups]
    variances = variances or [((p.loss_std / p.loss) ** 2, 1) for p in points if p.loss_std is not None]
    freedom = sum(weight for _, weight in variances)
    if not freedom:
        return None
    return math.sqrt(sum(weight * variance for variance, weight in variances) / freedom), freedom


def resample_seeds(points: Sequence[LossPoint], fit: Fit, deviation: float, count: int, seed: int = 0) -> Samples:
    """Fit surfaces to the fitted losses with noise of the spread of seeds, one draw a trunk.

    It leaves out all but the seed: how well the surface describes the losses, and the choice of sizes.

    Args:
        points: of one architecture.
        fit: of all points.
        deviation: relative standard deviation over seeds (`seed_deviation`).
        count: samples.
        seed: of the draws.
    """
    n, d, _ = arrays(points)
    trunks = list(dict.fromkeys(point.group for point in points))
    of_point = np.array([trunks.index(point.group) for point in points])
    rng = np.random.default_rng(seed)
    expected = fit.surface.loss(n, d)
    noise = np.exp(deviation * rng.normal(size=(count, len(trunks))))[:, of_point]
    return Samples([refit(fit, n, d, expected * each) for each in noise], 1.0)


def refit(fit: Fit, params: Floats, tokens: Floats, loss: Floats, weights: Floats | None = None) -> Surface:
    """Fit a surface to other losses by the method of a fit, from that one's surface."""
    if fit.method == "vpnls":
        return fit_vpnls(params, tokens, loss, weights, start=fit.surface).surface
    is_free = fit.surface.gamma != 1.0
    return fit_huber(params, tokens, loss, weights, start=fit.surface, free_gamma=is_free).surface


def arrays(points: Sequence[LossPoint]) -> tuple[Floats, Floats, Floats]:
    """Parameters, tokens and losses of points, each of shape (points,)."""
    n, d, loss = np.array([(each.params, each.tokens, each.loss) for each in points], dtype=float).T
    return n, d, loss
