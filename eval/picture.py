"""Curves over a length, one panel for each comparison, as a PNG. The one place of the speed studies that draws."""

from __future__ import annotations

from pathlib import Path

Curves = dict[str, list[tuple[float, float]]]


def draw_over_length(panels: dict[str, Curves], path: Path, *, x_label: str, y_label: str) -> bool:
    """Write one panel of curves (points x, y by name) for each title. Says so and gives False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No picture {path}: matplotlib is not installed.")
        return False
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.5 + 0.1 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in curves.items():
            index = names.index(name)
            own = name.startswith(("mlstm /", "slstm", "xlstm"))
            style = {"color": f"C{index % 10}", "linewidth": 2.4 if own else 1.2, "linestyle": "-" if own else "--"}
            axes.plot(*zip(*sorted(points)), marker="o", markersize=4, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(True, which="both", alpha=0.25)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    columns = 1 + len(panels)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
