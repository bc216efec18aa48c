"""Pictures of fits: losses with the frontier, parabolas, best sizes, residuals, and predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.scaling_laws.bootstrap import arrays
from eval.scaling_laws.fits import ArchitectureFit, Fits
from eval.scaling_laws.forecast import Forecast
from eval.scaling_laws.predict import residuals
from eval.study.picture import draw_panels

PANEL = (5.6, 4.4)
"""Inches of a panel."""
FEW_POWERS = 1000
"""Ratio of the ends of a logarithmic axis below which powers of ten are too few ticks."""


def draw_all(fits: Fits, forecasts: Sequence[Forecast], folder: Path) -> list[Path]:
    """Draw every picture that the fits have data for, as PNG and SVG, and return the PNG files."""
    fitted = [each for each in fits.architectures if each.fits]
    gridded = [each for each in fits.architectures if each.isoflop]
    pictures: list[tuple[str, list[str], Callable[[Any, str], None]]] = []
    if fitted:
        pictures.append(("loss", ["Loss and frontier"], lambda axes, _: _loss(axes, fitted)))
    if gridded:
        pictures.append(("isoflop", _names(gridded), _by_name(gridded, _parabolas)))
    if fitted or gridded:
        panels = {"Best size N*": "params", "Best number of tokens D*": "tokens"}
        architectures = fits.architectures
        pictures.append(("optimum", list(panels), lambda axes, title: _optimum(axes, architectures, panels[title])))
    if fitted:
        pictures.append(("residuals", _names(fitted), _by_name(fitted, _residuals)))
    if forecasts or any(each.held_out for each in fitted):
        pictures.append(("predicted", ["Predicted and measured"], lambda axes, _: _predicted(axes, fitted, forecasts)))
    drawn = []
    for name, titles, fill in pictures:
        inches = (PANEL[0] * len(titles), PANEL[1])
        if draw_panels(folder / f"{name}.png", titles, fill, inches=inches, and_svg=True):
            drawn.append(folder / f"{name}.png")
    return drawn


def _names(architectures: Sequence[ArchitectureFit]) -> list[str]:
    return [each.architecture for each in architectures]


def _by_name(
    architectures: Sequence[ArchitectureFit], draw: Callable[[Any, ArchitectureFit], None]
) -> Callable[[Any, str], None]:
    """Draw the architecture that a panel's title names."""
    found = {each.architecture: each for each in architectures}

    def fill(axes: Any, title: str) -> None:
        draw(axes, found[title])
        axes.set_title(title)

    return fill


def _loss(axes: Any, fitted: Sequence[ArchitectureFit]) -> None:
    """Measured losses over FLOPs, a trunk's connected, with the frontier of each architecture."""
    for number, each in enumerate(fitted):
        color = f"C{number}"
        for group in dict.fromkeys(point.group for point in each.points):
            points = sorted((p.flops, p.loss) for p in each.points if p.group == group)
            axes.plot(*zip(*points), "o-", color=color, markersize=3, linewidth=0.6, alpha=0.6)
        frontier = [(best.flops, best.loss) for best in each.frontier]
        axes.plot(*zip(*frontier), color=color, linewidth=2.2, label=f"{each.architecture}, frontier")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss, nats a token", title="Loss and frontier")
    _finish(axes)


def _parabolas(axes: Any, found: ArchitectureFit) -> None:
    """The losses of each budget over parameters with its parabola and the minimum."""
    assert found.isoflop
    for number, budget in enumerate(found.isoflop.budgets):
        n, _, loss = arrays(budget.points)
        color = f"C{number % 10}"
        axes.plot(n, loss, "o", color=color, markersize=4, label=f"{budget.flops:.2g} FLOPs")
        dense = np.geomspace(n.min(), n.max(), 100)
        axes.plot(dense, budget.over_params.at(dense), color=color, linewidth=1.2)
        if n.min() < budget.over_params.minimum < n.max():
            axes.plot(budget.over_params.minimum, budget.over_params.loss, "*", color=color, markersize=12)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss, nats a token")
    _finish(axes)


def _optimum(axes: Any, architectures: Sequence[ArchitectureFit], quantity: str) -> None:
    """N* or D* over FLOPs: lines of the surface's frontier, stars of the parabolas."""
    for number, each in enumerate(architectures):
        color = f"C{number}"
        if each.frontier:
            line = [(best.flops, getattr(best, quantity)) for best in each.frontier]
            axes.plot(*zip(*line), color=color, label=f"{each.architecture}, surface")
        if each.isoflop:
            stars = [(b.flops, getattr(b, f"over_{quantity}").minimum) for b in each.isoflop.budgets if not b.warnings]
            if stars:
                axes.plot(*zip(*stars), "*", color=color, markersize=9, label=f"{each.architecture}, parabola")
    title = "Best size N*" if quantity == "params" else "Best number of tokens D*"
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=title, title=title)
    _finish(axes)


def _residuals(axes: Any, found: ArchitectureFit) -> None:
    """Measured over fitted loss of both fits."""
    flops = [point.flops for point in found.points]
    for (method, fit), marker in zip(found.fits.items(), "ox"):
        axes.plot(flops, 100 * np.expm1(residuals(fit, found.points)), marker, label=method, markersize=4, alpha=0.8)
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="measured over fitted loss, %")
    _finish(axes)


def _predicted(axes: Any, fitted: Sequence[ArchitectureFit], forecasts: Sequence[Forecast]) -> None:
    """Predicted over measured losses of held-out points and of forecasts, with their intervals."""
    rows = [
        (each.architecture, held.measured, held.expected, held.predicted, "held out")
        for each in fitted
        for held in each.held_out
    ]
    rows += [
        (each.architecture, each.measured, each.predicted, each, "forecast") for each in forecasts if each.measured
    ]
    names = list(dict.fromkeys(name for name, *_ in rows))
    for name, measured, expected, ends, kind in rows:
        error = [[expected - ends.low], [ends.high - expected]] if ends else None
        marker = "D" if kind == "forecast" else "o"
        style = {"color": f"C{names.index(name)}", "label": f"{name}, {kind}", "capsize": 3}
        axes.errorbar([measured], [expected], yerr=error, fmt=marker, **style)
    if rows:
        ends = [min(row[1] for row in rows), max(row[1] for row in rows)]
        axes.plot(ends, ends, color="#444444", linewidth=0.8)
    axes.set(xlabel="measured loss, nats a token", ylabel="predicted", title="Predicted and measured")
    _finish(axes)


def _finish(axes: Any) -> None:
    """Add the grid, readable ticks of logarithmic axes, and the legend."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "log" and high / low < FEW_POWERS:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:.3g}")
            axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    if handles:
        axes.legend(handles.values(), handles.keys(), fontsize="x-small")
