"""The picture of gradient reach: a panel for each stage, both axes logarithmic, and every curve with its name on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from eval.study.picture import draw_panels, spread_out

COLORS = ("#8c8c8c", "#1f77b4", "#d62728", "#ff7f0e", "#2ca02c", "#7b3fb5", "#111111", "#f08cb4", "#00b3c8")
LOWEST, HIGHEST = 1e-10, 10.0
"""Ends of the vertical axis; a curve that falls below it is named there."""
LINE = 0.05
"""Height of a name, of the panel's."""
NEAR_EDGE = 0.85
"""Share of the panel's width."""
OUTLINE = [withStroke(linewidth=3, foreground="white")]


def draw_reach(reaches: list[dict[str, Any]], path: Path) -> bool:
    """Median of g(k) / g(0) over k, of `eval.gradient_reach.reach.Reach` as mappings."""
    stages = list(dict.fromkeys(reach["stage"] for reach in reaches))
    names = list(dict.fromkeys(reach["name"] for reach in reaches))

    def fill(axes: Axes, stage: str) -> None:
        curves = {}
        for reach in reaches:
            if reach["stage"] == stage:
                distances = np.array([math.sqrt(each["first"] * each["last"]) for each in reach["bins"]])
                heights = np.array([_height(each["median"]) for each in reach["bins"]])
                curves[reach["name"]] = (distances, heights)
        _panel(axes, curves, names)
        axes.set_title(stage, fontsize="large")
        axes.set_xlabel("k: tokens between an input and the prediction")
        if stage == stages[0]:
            axes.set_ylabel("gradient at the input k tokens back, over that at k = 0")

    return draw_panels(path, stages, fill, inches=(1 + 6.4 * len(stages), 5.4), dpi=130)


def _height(value: float) -> float:
    """Place of a value on the vertical axis, from 0 at its foot to 1; a vanished gradient is far below."""
    return math.log(max(value, 1e-300) / LOWEST) / math.log(HIGHEST / LOWEST)


def _panel(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str]) -> None:
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    last = max(distances[-1] for distances, _ in curves.values())
    axes.set(xscale="log", yscale="log", xlim=(1, last), ylim=(LOWEST, HIGHEST))
    axes.set_xticks([4**power for power in range(20) if 4**power <= last])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set_yticks([10.0**power for power in range(-10, 2, 2)])
    axes.grid(alpha=0.25)
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    ends: dict[str, tuple[float, float]] = {}
    leaving: dict[str, float] = {}
    for name, (distances, heights) in curves.items():
        values = LOWEST * (HIGHEST / LOWEST) ** np.maximum(heights, -1)
        style = "-" if names.index(name) < len(COLORS) else "--"
        axes.plot(distances, values, style, color=colors[name], linewidth=1.9, solid_capstyle="round")
        if heights[-1] > 0:
            ends[name] = (1, float(heights[-1]))
        else:
            leaving[name] = _where(distances, heights, 0)
    # Those that leave at the foot are named there, or beside the panel where they come near its edge.
    inside = [name for name, distance in leaving.items() if distance < last**NEAR_EDGE]
    for line, name in enumerate(sorted(inside, key=leaving.__getitem__), start=1):
        height = 1.2 * LINE * line
        place = (_where(*curves[name], height), LOWEST * (HIGHEST / LOWEST) ** height)
        axes.annotate(f"{name} ", place, color=colors[name], ha="right", va="center", path_effects=OUTLINE)
    for name in leaving.keys() - inside:
        ends[name] = (math.log(_where(*curves[name], LINE)) / math.log(last), LINE)
    order = sorted(ends, key=lambda name: ends[name][1])
    for name, height in zip(order, spread_out([ends[name][1] for name in order], LINE), strict=True):
        line = {"arrowstyle": "-", "color": colors[name], "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 0}
        where = {"xycoords": "axes fraction", "xytext": (1.045, height)}
        axes.annotate(name, ends[name], **where, color=colors[name], va="center", arrowprops=line | {"shrinkB": 0})


def _where(distances: np.ndarray, heights: np.ndarray, height: float) -> float:
    """The distance at which a curve first falls below a height."""
    after = int(np.argmax(heights < height))
    if after == 0:
        return float(distances[0])
    share = (heights[after - 1] - height) / (heights[after - 1] - heights[after])
    return float(distances[after - 1] * (distances[after] / distances[after - 1]) ** share)
