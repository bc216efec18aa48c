"""The loss that a fit expects of a run, with the interval that its measured loss should be in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling_laws.bootstrap import LEVEL, Samples, arrays, widened
from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.surface import Fit, Floats


@dataclass(frozen=True)
class Prediction:
    """An expected loss."""

    loss: float
    """In nats a token."""
    low: float
    """Lower end of the interval for one run's measured loss; `bootstrap.LEVEL` of such intervals hold it."""
    high: float

    def holds(self, measured: float) -> bool:
        """Whether a measured loss is in the interval."""
        return self.low <= measured <= self.high


def residuals(fit: Fit, points: Sequence[LossPoint]) -> Floats:
    """Logarithm of the measured over the fitted loss of each point."""
    n, d, loss = arrays(points)
    return np.log(loss / fit.surface.loss(n, d))


def predict(
    fit: Fit, samples: Samples, points: Sequence[LossPoint], params: float, tokens: float, seed: int = 0
) -> Prediction:
    """Predict the loss of one run: the spread of the surface over samples, and that of single runs around it.

    Args:
        fit: of all points.
        samples: of the fit (`resample_trunks`).
        points: that the fit used; their residuals, corrected for the fitted parameters, are the spread of single runs.
        params: N of the run.
        tokens: D of the run.
        seed: of the draws.
    """
    expected = float(fit.surface.loss(params, tokens))
    left = residuals(fit, points)
    left = left * np.sqrt(len(left) / max(len(left) - 5, 1))
    rng = np.random.default_rng(seed)
    around = np.array([each.loss(params, tokens) for each in samples.surfaces], dtype=float)
    values = around * np.exp(rng.choice(left, size=len(around)))
    low, high = widened(values, expected, samples.widening, LEVEL)
    return Prediction(expected, low, high)
