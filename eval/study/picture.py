"""Curves over a length, one panel for each comparison, as a PNG. The one place of the speed studies that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[float, float]]]
OWN = ("mlstm /", "slstm", "xlstm")
PANEL_INCHES, CHARACTERS_AN_INCH = 5.0, 13.0


def draw_over_length(panels: dict[str, Curves], path: Path, *, x_label: str, y_label: str) -> bool:
    """Write one panel of curves (points x, y by name) for each title. Says so and gives False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No picture {path}: matplotlib is not installed.")
        return False
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width = 1 + PANEL_INCHES * len(panels)
    columns = max(1, min(len(names), int(width * CHARACTERS_AN_INCH / (max(map(len, names)) + 8))))
    height = 4.5 + 0.25 * -(-len(names) // columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in curves.items():
            axes.plot(*zip(*sorted(points)), label=name, **style(name, names.index(name)))
        _scale(axes, sorted({x for points in curves.values() for x, _ in points}))
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def style(name: str, index: int) -> dict[str, Any]:
    """How to draw a curve: ours in thick lines; a marker of its own where colours come round again."""
    own = name.startswith(OWN)
    return {
        "color": f"C{index % 10}",
        "marker": "os^Dv"[index // 10 % 5],
        "markersize": 4,
        "linewidth": 2.4 if own else 1.2,
        "linestyle": "-" if own else "--",
    }


def _scale(axes: Any, lengths: list[float]) -> None:
    """Both axes logarithmic, with plain numbers on them: the lengths there are, and 1, 2 and 5 times powers of 10."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths], rotation=30 if len(lengths) > 5 else 0)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)
