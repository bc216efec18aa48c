"""Fit a surface by variable projection with non-negative least squares (VPNLS).

For given exponents the loss is linear in E, A and B, so non-negative least squares finds these exactly, and the search
has two dimensions: a grid over alpha and beta, then a polish of its lowest points. The method is that of "Problems with
Chinchilla Approach 2" (Open-Athena/scaling-law-analysis).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from eval.scaling_laws.surface import EXPONENTS, Fit, Floats, ScaledPoints, Surface

GRID = np.geomspace(0.03, 2.0, 25)
"""Exponents of the grid, for alpha and for beta."""
POLISHED = 5
"""Lowest local minima of the grid that are polished."""
FINE, COARSE = 1e-15, 1e-9
"""Relative precision of a polish from the grid, and of one of the many from a given start."""
SAME, TINY = 1e-4, 1e-20
"""Relative and absolute difference of the sums of squares of two polished points that count as the same minimum."""


class _Problem(ScaledPoints):
    """Least squares of the losses."""

    @functools.cached_property
    def root_weight(self) -> Floats:
        """Square root of each point's weight."""
        return np.sqrt(self.weights)

    def basis(self, exponents: Floats) -> Floats:
        """Weighted columns of E, A and B for given exponents."""
        return self.terms(*exponents) * self.root_weight[:, None]

    def coefficients(self, exponents: Floats) -> Floats:
        """Non-negative E, A and B with the least squares."""
        return nnls(self.basis(exponents), self.loss * self.root_weight)[0]

    def residuals(self, exponents: Floats) -> Floats:
        """Weighted residuals at the best coefficients."""
        return self.loss * self.root_weight - self.basis(exponents) @ self.coefficients(exponents)

    def jacobian(self, exponents: Floats) -> Floats:
        """Derivatives of the residuals by the exponents, in Kaufman's form: its gradient is exact."""
        coefficients, basis = self.coefficients(exponents), self.basis(exponents)
        slopes = np.stack([self.log_n * basis[:, 1], self.log_d * basis[:, 2]], axis=1) * coefficients[1:]
        orthogonal, _ = np.linalg.qr(basis[:, coefficients > 0])
        return slopes - orthogonal @ (orthogonal.T @ slopes)


def fit_vpnls(
    params: Floats,
    tokens: Floats,
    loss: Floats,
    weights: Floats | None = None,
    start: Surface | None = None,
) -> Fit:
    """Fit a surface with gamma = 1 to losses by least squares.

    Args:
        params: N of each point, shape (points,).
        tokens: D of each point.
        loss: L of each point, in nats a token.
        weights: of the squared residuals; None for 1 each.
        start: surface whose exponents begin the polish in place of the grid; None for the grid.

    Raises:
        ValueError: the points cannot determine a surface.
    """
    problem = _Problem.of(params, tokens, loss, weights, parameters=5)
    starts = _lowest_of_grid(problem) if start is None else [np.array([start.alpha, start.beta])]
    precision = FINE if start is None else COARSE
    polished = sorted((_polish(problem, each, precision) for each in starts), key=lambda each: each.cost)
    best = polished[0]
    others = [each for each in polished if each.cost > best.cost * (1 + SAME) + TINY]
    surface = problem.surface(*problem.coefficients(best.x), *best.x)
    return Fit(
        surface=surface,
        method="vpnls",
        objective=2 * float(best.cost),
        runner_up=2 * float(others[0].cost) if others else None,
        condition=condition_number(best.jac),
        bounds=surface.bounds(params, tokens),
        points=int(np.count_nonzero(problem.weights)),
    )


def condition_number(jacobian: Floats) -> float | None:
    """Condition number of the Gauss-Newton matrix J^T J; None where the losses leave a direction free."""
    singular = np.linalg.svd(jacobian, compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 1e-30 * singular[0] else None


def _lowest_of_grid(problem: _Problem) -> list[Floats]:
    """The exponents at the lowest local minima of the grid."""
    squares = np.array([[np.sum(problem.residuals(np.array([a, b])) ** 2) for b in GRID] for a in GRID])
    padded = np.pad(squares, 1, constant_values=np.inf)
    size = len(GRID)
    around = [padded[i : i + size, j : j + size] for i in range(3) for j in range(3)]
    minima = np.argwhere(squares <= np.minimum.reduce(around))
    minima = sorted(minima.tolist(), key=lambda place: squares[tuple(place)])[:POLISHED]
    return [np.array([GRID[i], GRID[j]]) for i, j in minima]


def _polish(problem: _Problem, exponents: Floats, precision: float) -> Any:
    tolerances = {"xtol": precision, "ftol": precision, "gtol": precision}
    return least_squares(problem.residuals, exponents, problem.jacobian, bounds=EXPONENTS, **tolerances)
