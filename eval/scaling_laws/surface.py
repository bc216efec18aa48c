"""The loss surface L(N, D) = E + (A N^-alpha + B D^-beta)^gamma, and the record of a fit of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MINOR_SHARE = 1e-3
"""A term of the surface below this share of every measured loss counts as zero: its parameter is at its bound."""


@dataclass(frozen=True)
class Surface:
    """A loss surface. Hoffmann et al. (arXiv 2203.15556) have gamma = 1, xLSTM's laws (arXiv 2510.02228) any."""

    E: float
    """Loss of an infinite model on infinite data, in nats a token."""
    A: float
    """Weight of the term of the parameters."""
    B: float
    """Weight of the term of the tokens."""
    alpha: float
    """Exponent of the parameters."""
    beta: float
    """Exponent of the tokens."""
    gamma: float = 1.0
    """Exponent of the sum of both terms."""

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> Any:
        """Compute the loss in nats a token.

        Args:
            params: N, parameters of the model; any shape.
            tokens: D, tokens of the training; broadcast against `params`.
        """
        n, d = np.asarray(params, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + (self.A * n**-self.alpha + self.B * d**-self.beta) ** self.gamma

    @property
    def exponent_of_params(self) -> float:
        """a in N* = G C^a for compute C proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    def bounds(self, params: ArrayLike, tokens: ArrayLike) -> list[str]:
        """Name the parameters at their bounds, such as "E = 0": the data does not determine them."""
        n, d = np.asarray(params, dtype=float), np.asarray(tokens, dtype=float)
        loss = self.loss(n, d)
        of_params = (self.A * n**-self.alpha) ** self.gamma
        of_tokens = (self.B * d**-self.beta) ** self.gamma
        terms = {"E": np.broadcast_to(self.E, loss.shape), "A": of_params, "B": of_tokens}
        active = [f"{name} = 0" for name, term in terms.items() if np.all(term < MINOR_SHARE * loss)]
        low, high = EXPONENTS
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value < low * 1.01 or value > high * 0.99:
                active.append(f"{name} = {value:.3g}")
        return active


EXPONENTS = (0.02, 3.0)
"""Least and greatest alpha and beta of a fit."""


@dataclass(frozen=True)
class Fit:
    """A surface fitted to losses, with the signs of how far it can be trusted."""

    surface: Surface
    method: str
    """vpnls or huber."""
    objective: float
    """Minimum that was found: sum of squared residuals of L (vpnls) or of Huber losses of log L (huber)."""
    runner_up: float | None
    """Objective of the next best separate minimum; None where all starts ended in the same one."""
    condition: float | None
    """Condition number of the Gauss-Newton matrix of the search: over two exponents (vpnls) or all parameters. None
    where the losses leave a direction free."""
    bounds: list[str]
    """Parameters at their bounds, such as "E = 0"."""
    points: int
    """Loss points that the fit used."""

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for a file."""
        return asdict(self)


def check_enough(params: Floats, tokens: Floats, parameters: int = 5) -> None:
    """Refuse data that cannot determine a surface.

    Raises:
        ValueError: fewer points than parameters, or fewer than 3 sizes or 3 numbers of tokens.
    """
    for name, values in (("params", params), ("tokens", tokens)):
        if len(np.unique(values)) < 3:
            raise ValueError(
                f"The points have {len(np.unique(values))} different values of {name}, but a surface needs at least 3: "
                "train more sizes and token counts, or fit with --form isoflop."
            )
    if len(params) < parameters:
        raise ValueError(
            f"There are {len(params)} loss points for a surface of {parameters} parameters; it needs at least "
            f"{parameters}: train more runs."
        )


@dataclass(frozen=True)
class ScaledPoints:
    """Points of a fit, in units of their geometric means, because powers of plain counts are ill-conditioned."""

    log_n: Floats
    """log of params over `unit_n`, shape (points,)."""
    log_d: Floats
    """log of tokens over `unit_d`."""
    loss: Floats
    weights: Floats
    unit_n: float
    unit_d: float

    @classmethod
    def of(cls, params: Floats, tokens: Floats, loss: Floats, weights: Floats | None, parameters: int) -> Self:
        """Scale points; weights of None are 1 each.

        Raises:
            ValueError: the points with a weight cannot determine a surface of so many parameters.
        """
        used = np.ones_like(loss) if weights is None else np.asarray(weights, dtype=float)
        check_enough(params[used > 0], tokens[used > 0], parameters)
        log_n, log_d = np.log(params), np.log(tokens)
        middle_n, middle_d = float(log_n.mean()), float(log_d.mean())
        return cls(log_n - middle_n, log_d - middle_d, loss, used, math.exp(middle_n), math.exp(middle_d))

    def terms(self, alpha: float, beta: float) -> Floats:
        """Factors of E, A and B in the loss of each point, shape (points, 3)."""
        return np.stack([np.ones_like(self.loss), np.exp(-alpha * self.log_n), np.exp(-beta * self.log_d)], axis=1)

    def surface(self, E: float, A: float, B: float, alpha: float, beta: float, gamma: float = 1.0) -> Surface:
        """The surface of parameters in scaled units, in plain ones."""
        A, B = A * self.unit_n**alpha, B * self.unit_d**beta
        return Surface(*map(float, (E, A, B, alpha, beta, gamma)))
