"""Pictures of curves, one panel for each comparison, as a PNG; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[float, float]]]
OWN = ("mlstm /", "slstm", "gated_delta /", "xlstm")
PANEL_INCHES, CHARACTERS_AN_INCH = 5.0, 13.0


def draw_panels(
    path: Path,
    titles: Sequence[str],
    fill: Callable[[Any, str], None],
    *,
    inches: tuple[float, float],
    legend: dict[str, Any] | None = None,
    title: str = "",
    share_y: bool = False,
    dpi: int = 150,
    and_svg: bool = False,
) -> bool:
    """Write a PNG with a panel for each title, which `fill` draws on its axes; `legend` has the options of one for all.
    With `and_svg` the same picture is written as SVG beside it.

    Without matplotlib, print a note and return False.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No picture {path}: matplotlib is not installed.")
        return False
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, each in zip(figure.subplots(1, len(titles), squeeze=False, sharey=share_y)[0], titles):
        fill(axes, each)
    if legend is not None:
        handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), fontsize="small", **legend)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    if and_svg:
        with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same file whenever the same is drawn
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return True


def draw_over_length(panels: dict[str, Curves], path: Path, *, x_label: str, y_label: str) -> bool:
    """Write one panel of curves (points x, y by name) for each title. False without matplotlib."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width = 1 + PANEL_INCHES * len(panels)
    columns = max(1, min(len(names), int(width * CHARACTERS_AN_INCH / (max(map(len, names)) + 8))))

    def fill(axes: Any, title: str) -> None:
        curves = panels[title]
        for name, points in curves.items():
            axes.plot(*zip(*sorted(points)), label=name, **style(name, names.index(name)))
        _scale(axes, sorted({x for points in curves.values() for x, _ in points}))
        axes.set(title=title, xlabel=x_label, ylabel=y_label)

    legend = {"loc": "outside lower center", "ncols": columns}
    return draw_panels(path, [*panels], fill, inches=(width, 4.5 + 0.25 * -(-len(names) // columns)), legend=legend)


def style(name: str, index: int) -> dict[str, Any]:
    """Style of a curve: thick lines for our models, another marker where the colors repeat."""
    own = name.startswith(OWN)
    return {
        "color": f"C{index % 10}",
        "marker": "os^Dv"[index // 10 % 5],
        "markersize": 4,
        "linewidth": 2.4 if own else 1.2,
        "linestyle": "-" if own else "--",
    }


def _scale(axes: Any, lengths: list[float]) -> None:
    """Make both axes logarithmic, with plain numbers: the measured lengths, and 1, 2 and 5 times powers of 10."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths], rotation=30 if len(lengths) > 5 else 0)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions nearest (in squares) to the ascending `wanted` ones, `gap` apart or, without room, less; within [0, 1]
    with half a gap to spare."""
    gap = min(gap, 1 / max(1, len(wanted)))
    pools: list[tuple[float, int]] = []  # isotonic regression of wanted - place * gap, by pooling what is out of order
    for place, each in enumerate(wanted):
        mean, count = each - place * gap, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    last = 1 - (len(wanted) - 0.5) * gap
    bases = [min(max(mean, gap / 2), last) for mean, count in pools for _ in range(count)]
    return [base + place * gap for place, base in enumerate(bases)]
