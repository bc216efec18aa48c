"""A study's runs put together: for every model the best learning rate, and mean and range over its seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.study.picture import style
from eval.tasks.study import LEARNING_RATE, SEED
from eval.tasks.task import Case, Task

PANEL_INCHES = 5.0


@dataclass(frozen=True)
class Curve:
    """Scaled accuracy of a model over the cases."""

    model: str
    panel: str
    """The other settings of the grid, such as "embedding_dim 64"; empty where there are none."""
    learning_rate: float | None
    """The best of those tried, by the first seed's validation loss; None where the grid has one for all."""
    seeds: int
    points: list[tuple[Case, float, float, float]]
    """A case, and the mean, the lowest and the highest over the seeds."""


def summarize(runs: list[dict[str, Any]]) -> list[Curve]:
    """The curves of a study's finished runs, in their order."""
    groups: dict[tuple[str, str], dict[float | None, list[dict[str, Any]]]] = {}
    for run in runs:
        others = [(key, value) for key, value in run["settings"].items() if key not in (SEED, LEARNING_RATE)]
        panel = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in others)
        by_rate = groups.setdefault((run["model"], panel), {})
        by_rate.setdefault(run["settings"].get(LEARNING_RATE), []).append(run)
    curves = []
    for (model, panel), by_rate in groups.items():
        rate = min(by_rate, key=lambda rate: by_rate[rate][0]["validation_loss"])
        chosen = [run["cases"] for run in by_rate[rate]]
        points = []
        for same in zip(*chosen, strict=True):
            scaled = [case["scaled"] for case in same]
            points.append((tuple(same[0]["case"]), fmean(scaled), min(scaled), max(scaled)))
        curves.append(Curve(model, panel, rate, len(chosen), points))
    return curves


def as_markdown(curves: list[Curve], task: Task) -> str:
    """One table: a row for each curve, mean and in brackets the range over the seeds."""
    heads = [" / ".join(map(str, case)) for case, *_ in curves[0].points]
    lines = [f"| model; {' / '.join(task.case_names)}: | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for curve in curves:
        cells = [
            f"{mean:.2f}" if curve.seeds == 1 else f"{mean:.2f} ({low:.2f} to {high:.2f})"
            for _, mean, low, high in curve.points
        ]
        rate = "" if curve.learning_rate is None else f"lr {curve.learning_rate:g}"
        name = ", ".join(filter(None, (curve.model, curve.panel, rate)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path, task: Task, title: str) -> bool:
    """Draw a panel for each group of settings, with the seeds' range as a band and what training has seen shaded.

    Says so and gives False without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No picture {path}: matplotlib is not installed.")
        return False
    names = list(dict.fromkeys(curve.model for curve in curves))
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(2.5 + PANEL_INCHES * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        axes.axvspan(*task.trained, color="0.93", label="in training")
        for curve in (curve for curve in curves if curve.panel == panel):
            cases, mean, low, high = zip(*sorted(curve.points, key=lambda point: point[0][-1]), strict=True)
            x = [case[-1] for case in cases]
            # Rings of their own size, so that curves on top of each other are all seen.
            rings = {"markersize": 3 + 2 * (len(names) - names.index(curve.model)), "markerfacecolor": "none"}
            shown = style(curve.model, names.index(curve.model)) | rings
            axes.plot(x, mean, label=curve.model, **shown)
            axes.fill_between(x, low, high, color=shown["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set(title=panel, xlabel=task.case_names[-1], ylim=(-0.15, 1.05))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("scaled accuracy (0: chance, 1: perfect)")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
