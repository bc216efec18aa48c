"""The parts of a report in every format: sections of paragraphs, pictures, tables and folded texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from eval.compare.report.drawing import Picture
from eval.compare.results import ModelResult
from eval.study.spread import Spread

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    strong: bool = False
    architecture: str = ""
    """Architecture whose color precedes the text; empty for none."""


@dataclass(kw_only=True)
class Table:
    """A table with numbers aligned to the right and the columns in `words` to the left."""

    columns: list[str]
    rows: list[list[Cell]]
    words: frozenset[int] = frozenset({0})
    title: str = ""
    folded: bool = False
    """Whether it stays closed until asked for."""


@dataclass(kw_only=True)
class Part:
    """A part of a section, usually one size."""

    heading: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def is_beside(self) -> bool:
        """Whether there is room for the tables beside the picture on a wide page."""
        return len(self.pictures) == 1 and all(len(table.columns) <= 10 for table in self.tables)


@dataclass(kw_only=True)
class Section:
    """One subject."""

    title: str
    lead: str = ""
    """Content of the section, and how it was measured."""
    parts: list[Part] = field(default_factory=list)
    folds: list[tuple[str, str]] = field(default_factory=list)
    """(title, verbatim text)."""
    terms: list[tuple[str, str]] = field(default_factory=list)
    """(term, what it means)."""
    absent: str = ""
    """Text for an empty section."""

    @property
    def anchor(self) -> str:
        """Name within the page, for links."""
        return self.title.lower().replace(" ", "-").replace(",", "")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.folds or self.terms or any(part.pictures or part.tables for part in self.parts))


def name_cell(model: ModelResult) -> Cell:
    """A model's label with its colour."""
    return Cell(model.label, architecture=model.architecture)


def cells(texts: Iterable[str], strong: bool = False) -> list[Cell]:
    """Plain cells."""
    return [Cell(text, strong) for text in texts]


def number(value: float | None, form: str) -> str:
    """A formatted number, or the sign for nothing."""
    return NOTHING if value is None else format(value, form)


def duration(seconds: float) -> str:
    """A run's duration: 42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def show_spread(found: Spread, decimals: int) -> str:
    """1.2345 ± 0.0021, or the value alone; without decimals from a thousand on."""
    decimals = decimals if found.mean < 1000 else 0
    shown = f"{found.mean:,.{decimals}f}"
    return shown if found.deviation is None else f"{shown} ± {found.deviation:,.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """A number with its sign, a minus as long as the plus."""
    return f"{value:+,.{decimals}f}".replace("-", "−")


def show_bytes(count: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.3g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"
