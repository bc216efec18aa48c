"""Fit a surface by the Huber loss of log L and L-BFGS, as Hoffmann et al. (arXiv 2203.15556, D.3) do."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from scipy.optimize import minimize, nnls

from eval.scaling_laws.surface import EXPONENTS, Fit, Floats, ScaledPoints, Surface
from eval.scaling_laws.vpnls import condition_number

DELTA = 1e-3
"""Residual of log L from which on the Huber loss is linear."""
GRID = (0.05, 0.1, 0.16, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
"""Exponents of the grid, for alpha and for beta."""
STARTS = 4
"""Places of the grid with the lowest objectives, from which L-BFGS descends."""
GAMMAS = (0.5, 1.0, 1.5)
"""Starts of gamma, where it is fitted."""
GAMMA_RANGE = (0.05, 10.0)
SMALLEST_LOG = -30.0
"""Lowest log of E, A and B in the fit's units: as good as zero."""
SAME = 1e-4
"""Relative difference of objectives below which two ends count as the same minimum."""


class _Problem(ScaledPoints):
    """Huber losses of log L. A place has log E, log A, log B, alpha, beta and, if fitted, gamma."""

    @functools.cached_property
    def log_loss(self) -> Floats:
        """log L of each point."""
        return np.log(self.loss)

    def model(self, place: Floats) -> tuple[Floats, Floats]:
        """Log loss of each point, shape (points,), and its derivatives by the place, (points, parameters)."""
        e, a, b, alpha, beta = place[:5]
        gamma = place[5] if len(place) > 5 else 1.0
        of_params, of_tokens = a - alpha * self.log_n, b - beta * self.log_d
        log_sum = np.logaddexp(of_params, of_tokens)
        value = np.logaddexp(e, gamma * log_sum)
        share = np.exp(gamma * log_sum - value)
        share_n, share_d = gamma * share * np.exp(of_params - log_sum), gamma * share * np.exp(of_tokens - log_sum)
        slopes = [np.exp(e - value), share_n, share_d, -share_n * self.log_n, -share_d * self.log_d]
        slopes += [share * log_sum] if len(place) > 5 else []
        return value, np.stack(slopes, axis=1)

    def objective(self, place: Floats) -> tuple[float, Floats]:
        """Sum of Huber losses over DELTA squared, which is of order one, and its gradient."""
        value, slopes = self.model(place)
        scaled = (value - self.log_loss) / DELTA
        clipped = np.clip(scaled, -1, 1)
        total = float(self.weights @ (clipped * (scaled - clipped / 2)))
        return total, (self.weights * clipped) @ slopes / DELTA


def fit_huber(
    params: Floats,
    tokens: Floats,
    loss: Floats,
    weights: Floats | None = None,
    start: Surface | None = None,
    free_gamma: bool = False,
) -> Fit:
    """Fit a surface to the logarithms of losses, robustly.

    Args:
        params: N of each point, shape (points,).
        tokens: D of each point.
        loss: L of each point, in nats a token.
        weights: of the Huber losses; None for 1 each.
        start: surface to begin from in place of the grid of starts; None for the grid.
        free_gamma: whether gamma is fitted; else it is 1.

    Raises:
        ValueError: the points cannot determine a surface.
    """
    problem = _Problem.of(params, tokens, loss, weights, parameters=6 if free_gamma else 5)
    starts = _starts(problem, free_gamma) if start is None else [_place(problem, start, free_gamma)]
    bounds = [(SMALLEST_LOG, None)] * 3 + [EXPONENTS] * 2 + ([GAMMA_RANGE] if free_gamma else [])
    ends = sorted((_descend(problem, each, bounds) for each in starts), key=lambda end: end[0])
    objective, place = ends[0]
    others = [value for value, _ in ends if value > objective * (1 + SAME) + 1e-12]
    surface = problem.surface(*np.exp(place[:3]), *place[3:])
    return Fit(
        surface=surface,
        method="huber",
        objective=objective * DELTA**2,
        runner_up=others[0] * DELTA**2 if others else None,
        condition=condition_number(problem.model(place)[1] * np.sqrt(problem.weights)[:, None]),
        bounds=surface.bounds(params, tokens),
        points=int(np.count_nonzero(problem.weights)),
    )


def _starts(problem: _Problem, free_gamma: bool) -> list[Floats]:
    """The best places of a grid of exponents, each with its least-squares E, A and B."""
    loss, found = problem.loss, []
    for alpha, beta in itertools.product(GRID, GRID):
        logs = np.log(np.maximum(nnls(problem.terms(alpha, beta), loss)[0], 1e-3 * np.mean(loss)))
        for gamma in GAMMAS if free_gamma else ():
            found.append(np.array([logs[0], logs[1] / gamma, logs[2] / gamma, alpha / gamma, beta / gamma, gamma]))
        if not free_gamma:
            found.append(np.array([*logs, alpha, beta]))
    return sorted(found, key=lambda place: problem.objective(place)[0])[:STARTS]


def _place(problem: _Problem, surface: Surface, free_gamma: bool) -> Floats:
    """The place of a surface in scaled units."""
    logs = np.log(np.maximum([surface.E, surface.A, surface.B], 1e-300))
    of_units = [0.0, surface.alpha * np.log(problem.unit_n), surface.beta * np.log(problem.unit_d)]
    place = [*np.maximum(logs - of_units, SMALLEST_LOG), surface.alpha, surface.beta]
    return np.array(place + ([surface.gamma] if free_gamma else []))


def _descend(problem: _Problem, place: Floats, bounds: list) -> tuple[float, Floats]:
    """Minimum that L-BFGS reaches from a place."""
    options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-10}
    end = minimize(problem.objective, place, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(end.fun), end.x
