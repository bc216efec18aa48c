"""The section of a comparison's report on its scaling study: exponents, FLOPs at equal loss, and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from eval.compare.report.drawing import COLORS, Picture, draw_panel
from eval.compare.report.parts import Cell, Part, Section, Table, cells
from eval.compare.report.pictures import colors_of
from eval.compare.results import Results
from eval.scaling_laws.bootstrap import LEVEL
from eval.scaling_laws.fits import Fits
from eval.scaling_laws.forecast import Forecast
from eval.scaling_laws.pictures import pictures_of
from eval.scaling_laws.summary import (
    BUDGETS,
    POINTS,
    RATIOS,
    VALUES,
    budget_rows,
    points_row,
    ratio_row,
    value_rows,
)

WORDS = {"architecture", "value", "compared with", "schedule"}
"""Columns of the tables that hold words."""


def scaling_section(results: Results) -> Section:
    """The scaling study; empty without one."""
    section = Section(title="Scaling laws")
    if results.scaling is None:
        return section
    fits, colors = results.scaling.fits, colors_of(results)
    section.lead = (
        f"From {results.scaling.source}, a study of each architecture at several sizes and numbers of tokens. "
        "L = E + (A N^-alpha + B D^-beta)^gamma in nats a token, for N parameters and D tokens; the best size grows as "
        "C^a with the compute C."
    )
    section.parts = [
        Part(pictures=_pictures(fits, results.scaling.forecasts, colors)),
        Part(tables=_tables(fits, colors)),
    ]
    warnings = [f"{each.architecture}: {text}" for each in fits.architectures for text in each.warnings]
    if remarks := warnings + fits.notes:
        section.folds = [("Warnings and notes of the fits", "\n".join(remarks))]
    return section


def _tables(fits: Fits, colors: dict[str, int]) -> list[Table]:
    """The tables that have rows."""
    found = [
        ("Loss points", POINTS, [points_row(each) for each in fits.architectures]),
        (
            f"Loss floor and exponents, with intervals of {LEVEL:.0%}",
            VALUES,
            [row for each in fits.architectures for row in value_rows(each)],
        ),
        (
            f"FLOPs at equal loss, each at its best size, with intervals of {LEVEL:.0%}",
            RATIOS,
            [ratio_row(each) for each in fits.comparisons],
        ),
        ("IsoFLOP parabolas", BUDGETS, [row for each in fits.architectures for row in budget_rows(each)]),
    ]
    return [_table(title, columns, rows, colors) for title, columns, rows in found if rows]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], colors: dict[str, int]) -> Table:
    """A table whose first column names an architecture, in its color if the comparison has it."""
    shown = [[Cell(name, architecture=name if name in colors else ""), *cells(rest)] for name, *rest in rows]
    words = frozenset(place for place, column in enumerate(columns) if column in WORDS)
    return Table(columns=list(columns), rows=shown, words=words, title=title)


def _pictures(fits: Fits, forecasts: Sequence[Forecast], colors: dict[str, int]) -> list[Picture]:
    """The panels of the study's pictures, one picture each, in the comparison's colors."""
    cycle = _cycle([each.architecture for each in fits.architectures], colors)
    found = []
    for picture in pictures_of(fits, forecasts):
        for number, (title, fill) in enumerate(picture.panels.items(), 1):
            name = f"scaling-{picture.name}" + (f"-{number}" if len(picture.panels) > 1 else "")
            alt = f"{title}: {picture.caption}"
            found.append(draw_panel(name, title, alt, fill, cycle))
    return found


def _cycle(architectures: Sequence[str], colors: dict[str, int]) -> list[int]:
    """All places in `COLORS`, those of a study's architectures first: the comparison's, and for others free ones."""
    free = [place for place in range(len(COLORS)) if place not in colors.values()]
    spare = itertools.cycle(free or range(len(COLORS)))
    first = [colors[name] if name in colors else next(spare) for name in architectures]
    return [*first, *(place for place in range(len(COLORS)) if place not in first)]
