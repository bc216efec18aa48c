"""Draw a comparison's pictures: one panel each, every line labelled where it ends, one color an architecture.

Each is made as PNG, and as SVG for a web page; the colors in the SVG are CSS variables that the page sets for a light
and for a dark ground.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from eval.study.picture import spread_out

COLORS = (
    ("#d55e00", "#ff8c42"),
    ("#0072b2", "#4da3e0"),
    ("#009e73", "#2fd0a2"),
    ("#b8579a", "#e59acb"),
    ("#333333", "#f2f2f2"),
    ("#d99000", "#ffca4f"),
    ("#4aa8e0", "#a9dcff"),
    ("#882255", "#c9668f"),
    ("#808080", "#a0a0a0"),
    ("#7a5c2e", "#bd9a64"),
    ("#4b3fbf", "#9d94ff"),
    ("#8a9a00", "#cbd94a"),
)
"""Colors of the architectures on a light and on a dark ground, after Okabe and Ito; markers differ as well."""
MARKERS = "osD^vPX<>*ph"
INK, FRAME, GRID = "#1f2329", "#8b9199", "#d9dde3"
WIDTH, HEIGHT = 5.2, 3.5
"""Inches of a panel."""
FONT_SIZE = 9.5
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FRAME,
    "grid.color": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "legend.edgecolor": GRID,
}


@dataclass(frozen=True)
class Picture:
    """A finished panel."""

    name: str
    """Name of the file, without the ending."""
    alt: str
    """Text instead of the picture, for screen readers."""
    svg: str
    png: bytes


@dataclass
class Line:
    """A curve, its band and its name."""

    architecture: str
    label: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float]] = field(default_factory=list)
    """(low, high) at each point."""
    dashed: bool = False


@dataclass(kw_only=True)
class Frame:
    """Title, axes and marks around the lines."""

    title: str
    x_label: str
    y_label: str
    lengths: bool = False
    """Whether x are lengths in tokens that double, with a tick at each."""
    log_x: bool = False
    ticks: list[tuple[float, str]] | None = None
    """Ticks of x as (place, label); None derives them from the lines."""
    log_y: bool = False
    y_limits: tuple[float, float] | None = None
    second_label: str = ""
    second: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    """From y to the numbers of a second axis on the right, and back."""
    mark: tuple[float, str] | None = None
    """A vertical line at an x, and its label."""


def draw_lines(name: str, frame: Frame, lines: Sequence[Line], colors: Mapping[str, int]) -> Picture:
    """Lines over x. `colors` gives the place in `COLORS` of each architecture."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        left, right = 0.68, 0.62 if frame.second else 0.12
        axes = _axes(figure, left=left, right=right, bottom=0.56, top=0.36)
        strip = max(len(line.label) for line in lines) * 0.078 + 0.3  # inches that the labels at the right end take
        _set_x(axes, frame, sorted({x for line in lines for x, _ in line.points}), strip / (WIDTH - left - right))
        _set_y(axes, frame, [y for line in lines for _, y in line.points])
        if frame.mark:
            x, words = frame.mark
            axes.axvline(x, color=FRAME, linewidth=1, linestyle=(0, (4, 3)))
            offset = {"xytext": (3, -8), "textcoords": "offset points"}
            axes.annotate(words, (x, 1), xycoords=("data", "axes fraction"), fontsize=FONT_SIZE - 1.5, **offset)
        for line in lines:
            _draw_line(axes, line, colors[line.architecture])
        _label_ends(axes, lines, colors, 1 - strip / (WIDTH - left - right))
        if frame.second:
            second = axes.secondary_yaxis("right", functions=frame.second)
            second.set_ylabel(frame.second_label)
            second.yaxis.set_major_formatter("{x:,g}")
        else:
            axes.spines["right"].set_visible(False)
        axes.set_xlabel(frame.x_label)
        axes.set_ylabel(frame.y_label)
        names = ", ".join(line.label for line in lines)
        return _finish(name, figure, frame.title, f"{frame.title}: {frame.y_label} over {frame.x_label} for {names}")


def draw_dots(
    name: str, title: str, x_label: str, rows: Sequence[tuple[str, str, list[float]]], colors: Mapping[str, int]
) -> Picture:
    """A row of dots for each (architecture, label, values), the first on top; a bar marks the mean.

    The axis ends where most rows are distinct; an arrow marks a mean beyond it.
    """
    means = [sum(values) / len(values) for _, _, values in rows]
    low, high = min(map(min, (values for *_, values in rows))), max(map(max, (values for *_, values in rows)))
    end = min(high, low + 3 * (statistics.median(means) - low)) if len(rows) > 3 else high
    with matplotlib.rc_context(STYLE):
        height = 1.0 + 0.27 * len(rows)
        figure = Figure(figsize=(WIDTH, height))
        left = 0.3 + 0.082 * max(len(label) for _, label, _ in rows)
        axes = _axes(figure, left=left, right=0.7, bottom=0.56, top=0.36)
        for place, ((architecture, _, values), mean) in enumerate(zip(rows, means)):
            color, marker = COLORS[colors[architecture]][0], MARKERS[colors[architecture]]
            style = {"color": color, "marker": marker, "linestyle": "none", "markeredgewidth": 0}
            if mean > end:
                arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.6}
                axes.annotate("", (1, place), (0.9, place), xycoords=axes.get_yaxis_transform(), arrowprops=arrow)
            axes.plot([mean, mean], [place - 0.32, place + 0.32], color=color, linewidth=2.4)
            axes.plot(values, [place] * len(values), markersize=5.5, alpha=0.75, **style)
            offset = {"xytext": (8, 0), "textcoords": "offset points"}
            axes.annotate(f"{mean:.3f}", (1, place), xycoords=("axes fraction", "data"), va="center", **offset)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
        axes.tick_params(axis="y", length=0)
        margin = 0.06 * (end - low) or 0.01 * abs(end) or 1.0
        axes.set_xlim(low - margin, end + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines["right"].set_visible(False)
        axes.set_xlabel(x_label)
        names = ", ".join(f"{label} {mean:.3f}" for (_, label, _), mean in zip(rows, means))
        return _finish(name, figure, title, f"{title}: {x_label}: {names}")


def draw_panel(
    name: str, title: str, alt: str, fill: Callable[[Axes], None], colors: Sequence[int] = range(len(COLORS))
) -> Picture:
    """A panel that another module draws on its axes; `colors` gives the places in `COLORS` of the axes' cycle."""
    cycle = matplotlib.cycler(color=[COLORS[place][0] for place in colors])
    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycle}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = _axes(figure, left=0.68, right=0.12, bottom=0.56, top=0.36)
        fill(axes)
        axes.spines["right"].set_visible(False)
        return _finish(name, figure, title, alt)


def length_label(length: float) -> str:
    """A length in tokens, with k for 1024: 256, 2k."""
    return f"{length / 1024:g}k" if length >= 1024 and length % 1024 == 0 else f"{length:,g}"


def large(count: float) -> str:
    """A count in thousands, millions, billions or trillions."""
    for divisor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{count / divisor:.3g}{unit}"
    return f"{count:g}"


def _axes(figure: Figure, *, left: float, right: float, bottom: float, top: float) -> Axes:
    """Axes with margins in inches, the same in every panel, which aligns panels side by side."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _set_x(axes: Axes, frame: Frame, values: list[float], strip: float) -> None:
    """Scale and ticks of x; the labels have the share `strip` at the right end."""
    low, high = values[0], values[-1]
    if frame.lengths or frame.log_x:
        axes.set_xscale("log", base=2 if frame.lengths else 10)
        low, high = (low, high) if high > low else (low / 2, high * 2)
        grown = (high / low) ** 0.03
        low, reach = low / grown, high * grown
        axes.set_xlim(low, low * (reach / low) ** (1 / (1 - strip)))
        shown = values if len(values) <= 8 else values[:: -(-len(values) // 8)]
        ticks = frame.ticks or [(each, length_label(each) if frame.lengths else f"{each:g}") for each in shown]
        axes.set_xticks(*zip(*ticks))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, high * 1.02 / (1 - strip))
        ticks = [tick for tick in MaxNLocator(5).tick_values(0, high) if 0 <= tick <= high * 1.01]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter("{x:,g}")


def _set_y(axes: Axes, frame: Frame, values: list[float]) -> None:
    if frame.log_y:
        axes.set_yscale("log")
        low, high = min(values), max(values)
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 2), max(high, middle * 2)  # an axis of less than a factor 4 would lack ticks
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: large(value))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        return
    low, high = frame.y_limits or (min(values), max(values))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))


def _draw_line(axes: Axes, line: Line, index: int) -> None:
    color = COLORS[index][0]
    x, y = zip(*line.points)
    every = max(1, -(-len(x) // 6))
    marks = {"marker": MARKERS[index], "markersize": 4.2, "markeredgewidth": 0}
    marks["markevery"] = slice((len(x) - 1) % every, None, every)
    axes.plot(x, y, color=color, linewidth=1.6, linestyle=(0, (4, 2)) if line.dashed else "-", **marks)
    if line.band:
        low, high = zip(*line.band)
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _label_ends(axes: Axes, lines: Sequence[Line], colors: Mapping[str, int], x: float) -> None:
    """Names in a column from the share `x` of the axes on, near the ends of their lines and without overlap."""
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    ends = [(min(max(float(to_share(line.points[-1])[1]), 0.0), 1.0), line) for line in lines]
    ends.sort(key=lambda end: end[0])
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    slots = spread_out([end for end, _ in ends], (FONT_SIZE + 2.5) / 72 / height)
    for (end, line), slot in zip(ends, slots):
        color, marker = COLORS[colors[line.architecture]][0], MARKERS[colors[line.architecture]]
        style = {"color": color, "transform": axes.transAxes, "clip_on": False}
        axes.plot([to_share(line.points[-1])[0], x + 0.015], [end, slot], linewidth=0.7, alpha=0.6, **style)
        axes.plot(x + 0.03, slot, marker, markersize=5, markeredgewidth=0, **style)
        axes.text(x + 0.055, slot, line.label, transform=axes.transAxes, va="center_baseline")


def _finish(name: str, figure: Figure, title: str, alt: str) -> Picture:
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", fontweight="bold", fontsize=FONT_SIZE + 0.5)
    png, svg = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure).print_figure(png, format="png", dpi=144, facecolor="white")
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Picture(name, alt, _for_page(svg.getvalue(), alt), png.getvalue())


def _for_page(svg: str, alt: str) -> str:
    """The <svg> element for a page, without the parts that only a file needs, its colors as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    view = re.search(r'viewBox="([^"]*)"', svg).group(1)
    label = html.escape(alt, quote=True)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view}" role="img" aria-label="{label}">', svg, count=1)
    variables = {light: f"var(--model-{index})" for index, (light, _) in enumerate(COLORS)}
    variables |= {INK: "var(--ink)", FRAME: "var(--frame)", GRID: "var(--grid)"}
    return re.sub("|".join(variables), lambda found: variables[found.group()], svg)
