"""Invented loss points: surfaces that tests fit, with grids, ladders and noise."""

from __future__ import annotations

import numpy as np

from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.surface import Floats, Surface

SYMMETRIC = Surface(1.69, 400.0, 400.0, 0.31, 0.31)
CHINCHILLA = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
ASYMMETRIC = Surface(1.69, 406.4, 410.7, 0.465, 0.155)


def best_tokens(surface: Surface, flops: Floats) -> Floats:
    """D* in closed form for C = 6 N D."""
    alpha, beta = surface.alpha, surface.beta
    scale = (beta * surface.B / (alpha * surface.A)) ** (1 / (alpha + beta))
    return scale * (flops / 6) ** (alpha / (alpha + beta))


def isoflop_grid(surface: Surface, width: float, count: int = 15, architecture: str = "model") -> list[LossPoint]:
    """Points without noise at C = 6 N D = 1e17 to 1e21: `count` values of D from D* / width to width D*."""
    points = []
    for flops in 10.0 ** np.arange(17, 22):
        best = float(best_tokens(surface, flops))
        points += [
            point(surface, flops / 6 / tokens, tokens, architecture=architecture)
            for tokens in np.geomspace(best / width, best * width, count)
        ]
    return points


def ladder(
    surface: Surface,
    sizes: Floats,
    per_parameter: Floats,
    noise: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    architecture: str = "model",
) -> list[LossPoint]:
    """A trunk for each size with a branch for each number of tokens a parameter.

    Args:
        surface: of the loss.
        sizes: parameters.
        per_parameter: tokens over parameters.
        noise: relative standard deviation of the losses, the part that a trunk's branches share and their own.
        seed: of the noise.
        architecture: name.
    """
    rng = np.random.default_rng(seed)
    points = []
    for number, params in enumerate(sizes):
        shared = noise[0] * rng.normal()
        for ratio in per_parameter:
            factor = np.exp(shared + noise[1] * rng.normal())
            points.append(point(surface, params, params * ratio, factor, architecture, f"{architecture}-trunk{number}"))
    return points


def point(
    surface: Surface, params: float, tokens: float, factor: float = 1.0, architecture: str = "model", trunk: str = ""
) -> LossPoint:
    """A point of a surface, its loss times a factor, with C = 6 N D."""
    params, tokens = float(params), float(tokens)
    run = f"{trunk or architecture}-{params:.6g}-{tokens:.6g}"
    loss = float(surface.loss(params, tokens) * factor)
    flops = 6 * params * tokens
    return LossPoint(
        run=run, trunk=trunk or run, architecture=architecture, params=params, tokens=tokens, flops=flops, loss=loss
    )


def columns(points: list[LossPoint]) -> tuple[Floats, Floats, Floats]:
    """Parameters, tokens and losses of points."""
    n, d, loss = np.array([(each.params, each.tokens, each.loss) for each in points]).T
    return n, d, loss
