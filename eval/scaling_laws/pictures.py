"""Pictures of fits: losses with the frontier, parabolas, best sizes, residuals, and predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class FitPicture:
    """A picture of fits, not drawn yet. Color number i of its axes' cycle is that of the architecture number i."""

    name: str
    """Name of its files, without the ending."""
    caption: str
    panels: dict[str, Callable[[Any], None]]
    """By the title of each panel, the function that draws on its axes."""


def pictures_of(fits: Fits, forecasts: Sequence[Forecast]) -> list[FitPicture]:
    """Every picture that the fits have data for."""
    fitted = [each for each in fits.architectures if each.fits]
    gridded = [each for each in fits.architectures if each.isoflop]
    found = []
    if fitted:
        caption = "Every loss point, branches of a trunk joined, and the frontier of the fitted surface."
        found.append(FitPicture("loss", caption, {"Loss and frontier": partial(_loss, fitted=fitted)}))
    if gridded:
        panels = {f"IsoFLOP parabolas, {each.architecture}": partial(_parabolas, found=each) for each in gridded}
        found.append(FitPicture("isoflop", "Parabolas of the loss at equal compute, with their minima.", panels))
    if fitted or gridded:
        caption = "Best size and number of tokens; stars are minima of parabolas without a warning."
        panels = {
            title: partial(_optimum, architectures=fits.architectures, quantity=quantity, title=title)
            for quantity, title in (("params", "Best size N*"), ("tokens", "Best number of tokens D*"))
        }
        found.append(FitPicture("optimum", caption, panels))
    if fitted:
        panels = {f"Residuals, {each.architecture}": partial(_residuals, found=each) for each in fitted}
        found.append(FitPicture("residuals", "Residuals of both fits.", panels))
    if any(each.measured for each in forecasts) or any(each.held_out for each in fitted):
        caption = "Losses predicted before they were measured, or from smaller runs alone, with their intervals."
        panels = {"Predicted and measured": partial(_predicted, fitted=fitted, forecasts=forecasts)}
        found.append(FitPicture("predicted", caption, panels))
    return found


def draw_all(pictures: Sequence[FitPicture], folder: Path) -> list[FitPicture]:
    """Draw pictures as PNG and SVG, and return those that were drawn: none without matplotlib."""

    def draw(picture: FitPicture) -> bool:
        def fill(axes: Any, title: str) -> None:
            picture.panels[title](axes)
            axes.set_title(title)

        titles = list(picture.panels)
        inches = (PANEL[0] * len(titles), PANEL[1])
        return draw_panels(folder / f"{picture.name}.png", titles, fill, inches=inches, and_svg=True)

    return [picture for picture in pictures if draw(picture)]


def _loss(axes: Any, fitted: Sequence[ArchitectureFit]) -> None:
    """Measured losses over FLOPs, a trunk's connected, with the frontier of each architecture."""
    for number, each in enumerate(fitted):
        color = f"C{number}"
        for group in dict.fromkeys(point.group for point in each.points):
            points = sorted((p.flops, p.loss) for p in each.points if p.group == group)
            axes.plot(*zip(*points), "o-", color=color, markersize=3, linewidth=0.6, alpha=0.6)
        frontier = [(best.flops, best.loss) for best in each.frontier]
        axes.plot(*zip(*frontier), color=color, linewidth=2.2, label=f"{each.architecture}, frontier")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss, nats a token")
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


def _optimum(axes: Any, architectures: Sequence[ArchitectureFit], quantity: str, title: str) -> None:
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
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=title)
    _finish(axes)


def _residuals(axes: Any, found: ArchitectureFit) -> None:
    """Measured over fitted loss of both fits."""
    flops = [point.flops for point in found.points]
    for (method, fit), marker in zip(found.fits.items(), "ox"):
        axes.plot(flops, 100 * np.expm1(residuals(fit, found.points)), marker, label=method, markersize=4, alpha=0.8)
    axes.axhline(0, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
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
    names = list(dict.fromkeys([each.architecture for each in fitted] + [name for name, *_ in rows]))
    for name, measured, expected, ends, kind in rows:
        error = [[expected - ends.low], [ends.high - expected]] if ends else None
        marker = "D" if kind == "forecast" else "o"
        style = {"color": f"C{names.index(name)}", "label": f"{name}, {kind}", "capsize": 3}
        axes.errorbar([measured], [expected], yerr=error, fmt=marker, **style)
    if rows:
        ends = [min(row[1] for row in rows), max(row[1] for row in rows)]
        axes.plot(ends, ends, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
    axes.set(xlabel="measured loss, nats a token", ylabel="predicted")
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
