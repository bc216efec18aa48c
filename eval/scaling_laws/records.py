"""Records of a dataclass as the rows of a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")
READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}
"""Reader of the text of a field, by the field's type; all others are text."""


def columns(kind: type) -> tuple[str, ...]:
    """Names of the columns, one for each field."""
    return tuple(each.name for each in dataclasses.fields(kind))


def as_csv(kind: type[R], records: Iterable[R]) -> str:
    """A header and a row for each record. None is empty, and whole numbers have no decimal point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(kind), lineterminator="\n")
    writer.writeheader()
    for record in records:
        values = {name: getattr(record, name) for name in writer.fieldnames}
        writer.writerow({name: _text(value) for name, value in values.items()})
    return text.getvalue()


def read_csv(kind: type[R], path: Path) -> list[R]:
    """The records of a file of `as_csv`.

    Raises:
        OSError: the file cannot be read.
        KeyError, TypeError, ValueError: it is damaged.
    """
    readers = {each.name: READERS.get(str(each.type), str) for each in dataclasses.fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: readers[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
