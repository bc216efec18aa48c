"""The fits of a table as Markdown: surfaces, exponents with intervals, best sizes, predictions and comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eval.bench.tables import markdown_table
from eval.scaling_laws.bootstrap import LEVEL
from eval.scaling_laws.compare import FlopsRatio
from eval.scaling_laws.fits import QUANTITIES, ArchitectureFit, Fits
from eval.scaling_laws.points import LossPoint

POINTS = ["architecture", "points", "trunks", "parameters", "tokens", "FLOPs", "schedule"]
VALUES = ["architecture", "value", "estimate", "by trunk", "by seed"]
BUDGETS = ["architecture", "FLOPs", "sizes", "N*", "D*", "lowest loss"]
RATIOS = ["architecture", "compared with", "loss", "FLOPs ratio", "interval"]
SURFACES = ["architecture", "fit", "E", "A", "B", "alpha", "beta", "gamma", "a", "objective", "runner-up", "condition"]


def as_markdown(fits: Fits) -> str:
    """Write all results as Markdown, warnings and notes last."""
    level = f"{LEVEL:.0%}"
    parts = []
    fitted = [each for each in fits.architectures if each.fits]
    parts += ["## Points", table(POINTS, [points_row(each) for each in fits.architectures])]
    if fitted:
        parts += ["## Surfaces", table(SURFACES, [row for each in fitted for row in _surface_rows(each)])]
        parts.append(
            "L = E + (A N^-alpha + B D^-beta)^gamma in nats a token; N* grows as C^a for C in proportion to N D."
        )
    if rows := [row for each in fitted if each.by_trunk for row in value_rows(each)]:
        parts += [f"## Intervals of {level}", table(VALUES, rows)]
    if rows := [row for each in fits.architectures for row in budget_rows(each)]:
        parts += ["## IsoFLOP parabolas", table(BUDGETS, rows)]
        parts += [_lines(each) for each in fits.architectures if each.isoflop]
    if fitted:
        parts += ["## Frontier", table(["architecture", "FLOPs", "N*", "D*", "D*/N*", "loss"], _frontier_rows(fitted))]
    if rows := [row for each in fits.architectures for row in _held_rows(each)]:
        header = ["architecture", "run", "FLOPs", "predicted", f"interval of {level}", "measured", "error"]
        parts += ["## Held out", table(header, rows)]
    if fits.comparisons:
        parts += [
            f"## FLOPs at equal loss, with intervals of {level}",
            table(RATIOS, [ratio_row(each) for each in fits.comparisons]),
        ]
        parts.append("FLOPs of the first over those of the second with which each, at its best size, reaches the loss.")
    warnings = [f"* {each.architecture}: {text}" for each in fits.architectures for text in each.warnings]
    warnings += [f"* {text}" for text in fits.notes]
    if warnings:
        parts += ["## Warnings and notes", "\n".join(warnings)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return markdown_table(f"| {' | '.join(header)} |", rows)


def points_row(found: ArchitectureFit) -> list[str]:
    """The row of an architecture in the table with the columns `POINTS`."""
    points = found.points
    ranges = [
        " to ".join(f"{end:.3g}" for end in (min(values), max(values)))
        for values in ([getattr(point, name) for point in points] for name in ("params", "tokens", "flops"))
    ]
    schedules = dict.fromkeys(_schedule(point.schedule_in_words, points) for point in points)
    return [found.architecture, str(len(points)), str(found.trunks), *ranges, "; ".join(schedules)]


def _schedule(words: str, points: Sequence[LossPoint]) -> str:
    """A schedule in words with the share of its cooldown in the points that have it."""
    shares = [point.cooldown_fraction for point in points if point.schedule_in_words == words]
    known = sorted({f"{share:.0%}" for share in shares if share}, key=lambda text: int(text[:-1]))
    over = f" over {' to '.join(dict.fromkeys((known[0], known[-1])))} of the steps" if known else ""
    return f"{words or 'unknown'}{over}"


def _surface_rows(found: ArchitectureFit) -> list[list[str]]:
    rows = []
    for method, fit in found.fits.items():
        surface = fit.surface
        numbers = [surface.E, surface.A, surface.B, surface.alpha, surface.beta, surface.gamma]
        runner_up = "none" if fit.runner_up is None else f"{fit.runner_up:.6g}"
        name = f"{method} (used)" if method == found.chosen and len(found.fits) > 1 else method
        last = [
            f"{surface.exponent_of_params:.4g}",
            f"{fit.objective:.6g}",
            runner_up,
            "infinite" if fit.condition is None else f"{fit.condition:.3g}",
        ]
        rows.append([found.architecture, name, *(f"{number:.5g}" for number in numbers), *last])
    return rows


def value_rows(found: ArchitectureFit) -> list[list[str]]:
    """The rows of an architecture in the table with the columns `VALUES`: of its surface, then of its parabolas."""
    values = {name: value(found.fit.surface) for name, value in QUANTITIES.items()} if found.fits else {}
    if found.isoflop:
        values |= {"a, parabolas": found.isoflop.a, "b, parabolas": found.isoflop.b}
    return [
        [
            found.architecture,
            name,
            f"{value:.4g}",
            interval(found.by_trunk.get(name)),
            interval(found.by_seed.get(name)),
        ]
        for name, value in values.items()
    ]


def interval(ends: tuple[float, float | None] | None) -> str:
    """An interval in text: "not measured" for None, "above" without an upper end."""
    if ends is None:
        return "not measured"
    return f"above {ends[0]:.4g}" if ends[1] is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def budget_rows(found: ArchitectureFit) -> list[list[str]]:
    """The rows of an architecture in the table with the columns `BUDGETS`; none without parabolas."""
    if found.isoflop is None:
        return []
    return [
        [
            found.architecture,
            f"{each.flops:.3g}",
            str(len(each.points)),
            f"{each.over_params.minimum:.4g}",
            f"{each.over_tokens.minimum:.4g}",
            f"{each.over_params.loss:.4f}",
        ]
        for each in found.isoflop.budgets
    ]


def _lines(found: ArchitectureFit) -> str:
    lines = found.isoflop
    assert lines is not None
    return (
        f"{found.architecture}: N* = {10**lines.n0:.4g} C^{lines.a:.4f}, D* = {10**lines.d0:.4g} C^{lines.b:.4f} by "
        "parabolas, which are biased where alpha and beta differ."
    )


def _frontier_rows(fitted: Sequence[ArchitectureFit]) -> list[list[str]]:
    return [
        [
            found.architecture,
            f"{each.flops:.3g}",
            f"{each.params:.4g}",
            f"{each.tokens:.4g}",
            f"{each.tokens / each.params:.3g}",
            f"{each.loss:.4f}",
        ]
        for found in fitted
        for each in found.frontier[::3]
    ]


def _held_rows(found: ArchitectureFit) -> list[list[str]]:
    rows = []
    for each in found.held_out:
        ends = interval((each.predicted.low, each.predicted.high)) if each.predicted else "not measured"
        error = f"{each.expected / each.measured - 1:+.2%}"
        losses = [f"{each.expected:.4f}", ends, f"{each.measured:.4f}", error]
        rows.append([found.architecture, each.run, f"{each.flops:.3g}", *losses])
    return rows


def ratio_row(found: FlopsRatio) -> list[str]:
    """The row of two architectures in the table with the columns `RATIOS`."""
    numbers = [f"{found.loss:.4f}", f"{found.ratio:.3g}", interval(found.interval)]
    return [found.architecture, found.over, *numbers]
