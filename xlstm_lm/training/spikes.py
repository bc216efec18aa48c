"""Detection of loss spikes: steps whose loss or gradient norm is an outlier among those of recent steps.

The center of recent values is their median m, their spread s = 1.4826 median |x - m|, which is the standard deviation
of normally distributed values (Rousseeuw and Croux 1993). Unlike mean and standard deviation, neither is moved by a few
extreme values. A value x is an outlier if x > m + threshold * s. Low values are none: no update is spoiled by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEASURED = ("loss", "gradient norm")
"""Quantities of a step, in the order in which they are stored."""
SPREAD_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
SMALLEST_SPREAD = 1e-3
"""Least spread, as a share of the median: values that hardly vary have no outliers within rounding."""


class SpikeDetector:
    """Detector of outliers. Recent values stay on the device, and no method but `state` and `report` waits for it."""

    def __init__(self, threshold: float, window: int, device: torch.device, state: Sequence[Sequence[float]] = ()):
        """Begin with the recent values of an earlier session, if there are any.

        Args:
            threshold: Spreads above the median from which on a value is an outlier.
            window: Number of recent values. Before there are as many, nothing is an outlier.
            device: Device of the values that are judged.
            state: Result of `state` of the earlier session; empty for a new run.
        """
        self.threshold, self.window = threshold, window
        recent = [list(values)[-window:] for values in state] or [[] for _ in MEASURED]
        self._recent_QW = torch.tensor(recent, dtype=torch.float32, device=device)
        self._judged_Q: Tensor | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there are enough recent values to judge by."""
        return self._recent_QW.shape[1] == self.window

    def is_outlier(self, values_Q: Tensor) -> Tensor:
        """Judge a step by the steps that were accepted before.

        Args:
            values_Q: Loss and gradient norm, float32 (2,), on the device.

        Returns:
            Scalar of type bool, on the device; False for NaN, which no comparison finds.
        """
        self._judged_Q = values_Q
        if not self.is_ready:
            return torch.zeros((), dtype=torch.bool, device=values_Q.device)
        return (self._spreads_above_median() > self.threshold).any()

    def accept(self) -> None:
        """Count the step judged last among the recent ones. Call it for steps whose update was applied."""
        assert self._judged_Q is not None
        kept_QW = self._recent_QW[:, -(self.window - 1) :]
        self._recent_QW = torch.cat((kept_QW, self._judged_Q[:, None]), dim=1)

    def outlying(self) -> list[str]:
        """Quantities of the step judged last that are outliers, by name. Waits for the device."""
        spreads = self._spreads_above_median().tolist()
        return [name for name, distance in zip(MEASURED, spreads) if distance > self.threshold]

    def report(self) -> str:
        """Describe the step judged last, an outlier, in a clause without subject. Waits for the device."""
        assert self._judged_Q is not None
        center_Q, _ = self._center_and_spread()
        numbers = zip(MEASURED, self._judged_Q.tolist(), center_Q.tolist(), self._spreads_above_median().tolist())
        parts = [
            f"its {name} {value:.4g} is {spreads:.1f} deviations above the median {center:.4g}"
            for name, value, center, spreads in numbers
            if spreads > self.threshold
        ]
        return f"{' and '.join(parts)} of {self.window} steps"

    def state(self) -> list[list[float]]:
        """Recent losses and gradient norms, oldest first, for a checkpoint. Waits for the device."""
        return self._recent_QW.tolist()

    def _spreads_above_median(self) -> Tensor:
        center_Q, spread_Q = self._center_and_spread()
        assert self._judged_Q is not None
        return (self._judged_Q - center_Q) / spread_Q

    def _center_and_spread(self) -> tuple[Tensor, Tensor]:
        center_Q = self._recent_QW.quantile(0.5, dim=1)
        deviations_QW = (self._recent_QW - center_Q[:, None]).abs()
        spread_Q = SPREAD_OF_NORMAL * deviations_QW.quantile(0.5, dim=1)
        least_Q = SMALLEST_SPREAD * center_Q.abs() + torch.finfo(torch.float32).tiny
        return center_Q, spread_Q.maximum(least_Q)
