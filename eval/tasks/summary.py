"""A study's runs put together: for every model the best learning rate, and mean and range over its seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.bench.tables import markdown_table
from eval.study.picture import PANEL_INCHES, draw_panels, style
from eval.tasks.study import LEARNING_RATE, SEED
from eval.tasks.task import Case, Task


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
    rows = []
    for curve in curves:
        rate = "" if curve.learning_rate is None else f"lr {curve.learning_rate:g}"
        row = [", ".join(filter(None, (curve.model, curve.panel, rate)))]
        row += [
            f"{mean:.2f}" if curve.seeds == 1 else f"{mean:.2f} ({low:.2f} to {high:.2f})"
            for _, mean, low, high in curve.points
        ]
        rows.append(row)
    return markdown_table(f"| model; {' / '.join(task.case_names)}: | {' | '.join(heads)} |", rows)


def draw(curves: list[Curve], path: Path, task: Task, title: str) -> bool:
    """Draw a panel for each group of settings, with the seeds' range as a band and the cases of training shaded.

    Without matplotlib, print a note and return False.
    """
    names = list(dict.fromkeys(curve.model for curve in curves))
    panels = list(dict.fromkeys(curve.panel for curve in curves))

    def fill(axes: Any, panel: str) -> None:
        axes.axvspan(*task.trained, color="0.93", label="in training")
        for curve in (curve for curve in curves if curve.panel == panel):
            cases, mean, low, high = zip(*sorted(curve.points, key=lambda point: point[0][-1]), strict=True)
            x = [case[-1] for case in cases]
            # Rings of their own size, which keep curves on top of each other visible.
            rings = {"markersize": 3 + 2 * (len(names) - names.index(curve.model)), "markerfacecolor": "none"}
            shown = style(curve.model, names.index(curve.model)) | rings
            axes.plot(x, mean, label=curve.model, **shown)
            axes.fill_between(x, low, high, color=shown["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set(title=panel, xlabel=task.case_names[-1], ylim=(-0.15, 1.05))
        axes.grid(alpha=0.3)
        if panel == panels[0]:
            axes.set_ylabel("scaled accuracy (0: chance, 1: perfect)")

    inches, legend = (2.5 + PANEL_INCHES * len(panels), 4.5), {"loc": "outside right center"}
    return draw_panels(path, panels, fill, inches=inches, legend=legend, title=title, share_y=True)
