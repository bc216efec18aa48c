"""Loss points: the columns of runs.csv, one row a measured loss, and their check on reading."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.scaling_laws.records import as_csv, columns
from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.mistakes import nearest

ALIASES = {"N": "params", "D": "tokens", "C": "flops", "L": "loss", "budget": "flops", "model": "architecture"}
"""Other names of columns, as published tables have them."""
REMEDY = "Correct the file, or leave that row out."
FINISHED = ("", "finished")
"""Statuses of rows that are used. Rows of any other are left out, with a note."""
CHECK = "check"
"""Status of a run that repeats a branch straight through."""
TOLERANCE = 0.01
"""Largest relative difference of flops to those of the run's configuration."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """A measured loss of a model after some training. Empty text and None stand for values that are not known."""

    run: str = ""
    """Name of the run."""
    trunk: str = ""
    """Name of the run that this one branched from; its own name where it did not branch."""
    architecture: str = "model"
    """Kind of model."""
    params: float
    """N, all parameters."""
    params_non_embedding: float | None = None
    """Parameters without embeddings and head."""
    tokens: float
    """D, tokens of the training."""
    flops: float
    """C, floating-point operations of the training."""
    flops_per_token: float | None = None
    """Training FLOPs of one token at the context."""
    context: int | None = None
    """Tokens of a row."""
    batch_tokens: int | None = None
    """Tokens of a step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    schedule: str = ""
    """Kind of the learning-rate schedule."""
    cooldown_fraction: float | None = None
    """Share of the steps in the cooldown."""
    cooldown_shape: str = ""
    """linear or 1-sqrt; empty for a run without a cooldown."""
    seed: int | None = None
    """Seed of weights and data order."""
    loss: float
    """L, held-out loss in nats a token."""
    loss_std: float | None = None
    """Standard deviation of the loss over seeds, of runs that differ in the seed alone; empty where there is one."""
    bits_per_byte: float | None = None
    """Held-out loss in bits a byte."""
    val_tokens: int | None = None
    """Tokens of held-out data."""
    data: str = ""
    """Name of the training data."""
    status: str = "finished"
    """State of the run."""
    git: str = ""
    """Commit of the code."""
    source: str = ""
    """Run folder, or file, that the row comes from."""

    @property
    def group(self) -> str:
        """Trunk of the point; points of one trunk share its noise."""
        return self.trunk or self.run

    @property
    def schedule_in_words(self) -> str:
        """Schedule with its cooldown, such as "wsd with a 1-sqrt cooldown"; empty where it is not known."""
        if not self.schedule or not self.cooldown_fraction:
            return self.schedule
        cooldown = f"{self.cooldown_shape} cooldown" if self.cooldown_shape else "cooldown of unknown shape"
        return f"{self.schedule} with a {cooldown}"


COLUMNS = columns(LossPoint)
ADDED = {"cooldown_shape"}
"""Columns that the tables of earlier versions lack."""
SAME_BUT_SEED = (
    *("architecture", "params", "tokens", "context", "batch_tokens", "learning_rate", "schedule"),
    *("cooldown_fraction", "cooldown_shape", "val_tokens", "data"),
)
"""Columns in which points agree that differ in the seed alone."""
NUMBERS = {"params", "tokens", "flops", "loss"}
"""Columns of positive numbers that a point cannot be without."""
OPTIONAL = {each.name for each in dataclasses.fields(LossPoint) if each.default is None}
"""Columns of numbers that may be empty."""
WHOLE = {"context", "batch_tokens", "seed", "val_tokens"}
"""Optional columns of whole numbers."""


@dataclass(frozen=True)
class Table:
    """Checked loss points."""

    points: list[LossPoint]
    notes: list[str] = field(default_factory=list)
    """Assumptions made on reading, and rows left out, in sentences."""
    checks: list[LossPoint] = field(default_factory=list)
    """Runs that repeat a branch straight through; no fit uses them."""

    @property
    def architectures(self) -> list[str]:
        """Names of the architectures, in the order of the file."""
        return list(dict.fromkeys(point.architecture for point in self.points))

    def of(self, architecture: str) -> list[LossPoint]:
        """The points of an architecture."""
        return [point for point in self.points if point.architecture == architecture]


def read_points(path: Path, configured_flops: Callable[[LossPoint], float | None] = lambda point: None) -> Table:
    """Read and check a table of loss points.

    Args:
        path: CSV with a header; the columns of `LossPoint` or their `ALIASES`, others are ignored. It needs params,
            loss, and tokens or flops. Without one of these two, flops are 6 params tokens, and a note names that.
        configured_flops: gives the FLOPs of a point from its run's configuration; None where there is none.

    Raises:
        ValueError: a column or a value is missing or not allowed, points contradict each other, or flops differ from
            those of the configuration by over 1 %; names the file, the line and the remedy.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            names = _columns(path, header)
            rows = [
                (
                    reader.line_num,
                    {names[key.strip()]: value for key, value in row.items() if key and key.strip() in names},
                )
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as a table: {reason}. Give a CSV file in UTF-8.") from None
    notes: list[str] = []
    points, checks, left_out, assumed = [], [], defaultdict(list), set()
    for line, row in rows:
        status = (row.get("status") or "").strip()
        if status == CHECK:
            checks.append(_point(f"{path}, line {line}", row, line, assumed))
            continue
        if status not in FINISHED:
            left_out[status].append(line)
            continue
        points.append(_point(f"{path}, line {line}", row, line, assumed))
    for status, lines in left_out.items():
        notes.append(f"Left out: {len(lines)} rows of status {status} (lines {', '.join(map(str, lines))}).")
    notes += [ASSUMPTIONS[each] for each in sorted(assumed)]
    if not points:
        raise ValueError(f"{path} has no finished row. Finish its runs and collect again.")
    check_points(points, str(path))
    check_flops(points, configured_flops, str(path))
    return Table(points, notes, checks)


ASSUMPTIONS = {
    "flops": "No flops in the file: C = 6 N D is assumed, which can be 40 % off for small recurrent models.",
    "tokens": "No tokens in the file: D = C / (6 N) is assumed, which can be 40 % off for small recurrent models.",
}


def _columns(path: Path, header: list[str]) -> dict[str, str]:
    """Map the header's names to columns; those that are known."""
    names = {name: ALIASES.get(name, name) for name in header if ALIASES.get(name, name) in COLUMNS}
    twice = [name for name in names.values() if list(names.values()).count(name) > 1]
    if twice:
        listed = ", ".join(name for name, column in names.items() if column == twice[0])
        raise ValueError(f"{path} has the column {twice[0]} more than once ({listed}): leave one.")
    present = set(names.values())
    missing = [name for name in ("params", "loss") if name not in present]
    missing += ["tokens (or flops)"] if not present & {"tokens", "flops"} else []
    if missing:
        hints = [nearest(name.split()[0], header, otherwise="") for name in missing]
        hint = " ".join(dict.fromkeys(each for each in hints if each))
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}. {hint} Columns may also "
            f"be called {', '.join(f'{alias} ({name})' for alias, name in ALIASES.items())}."
        )
    return names


def _point(where: str, row: dict[str, Any], line: int, assumed: set[str]) -> LossPoint:
    values: dict[str, Any] = {}
    for name, text in row.items():
        text = (text or "").strip()
        if name in NUMBERS or name in OPTIONAL:
            values[name] = _number(where, name, text) if text else None
        elif text:
            values[name] = text
    for name in ("params", "loss"):
        if values.get(name) is None:
            raise ValueError(f"{where}: {name} is empty. {REMEDY}")
    if values.get("tokens") is None and values.get("flops") is None:
        raise ValueError(f"{where}: tokens and flops are both empty. {REMEDY}")
    if values.get("flops") is None:
        known = values.get("flops_per_token")
        if known is None:
            assumed.add("flops")
        values["flops"] = (known or 6 * values["params"]) * values["tokens"]
    if values.get("tokens") is None:
        known = values.get("flops_per_token")
        if known is None:
            assumed.add("tokens")
        values["tokens"] = values["flops"] / (known or 6 * values["params"])
    values.setdefault("run", f"line-{line}")
    values.setdefault("trunk", values["run"])
    return LossPoint(**values)


def _number(where: str, name: str, text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {name} is {text!r}, which is no number. {REMEDY}") from None
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: {name} is {text}, which is not finite. {REMEDY} A run that diverged has the status diverged."
        )
    if name in NUMBERS and value <= 0:
        raise ValueError(f"{where}: {name} is {text}; it must be above 0. {REMEDY}")
    if name == "loss_std" and value < 0:
        raise ValueError(f"{where}: {name} is {text}; it must be 0 or above. {REMEDY}")
    if name in WHOLE:
        if value != int(value):
            raise ValueError(f"{where}: {name} is {text}; it must be a whole number. {REMEDY}")
        return int(value)
    return value


def ends_in_words(values: Iterable[float], form: str = ".3g") -> str:
    """The smallest and the largest of some values, once if they read the same."""
    listed = list(values)
    return " to ".join(dict.fromkeys(format(end, form) for end in (min(listed), max(listed))))


def repeated(points: Iterable[LossPoint]) -> list[list[LossPoint]]:
    """Group the points that differ in the seed alone, a point for each seed; those of a single seed are left out."""
    groups: dict[tuple, dict[Any, LossPoint]] = defaultdict(dict)
    for point in points:
        same = tuple(getattr(point, name) for name in SAME_BUT_SEED)
        groups[same].setdefault(point.run if point.seed is None else point.seed, point)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def check_points(points: Iterable[LossPoint], where: str) -> None:
    """Refuse points that contradict each other.

    Args:
        points: of all architectures.
        where: name of their file, for the message.

    Raises:
        ValueError: a point is there twice, or a trunk has branches of different learning rates, sizes or seeds.
    """
    runs: dict[str, LossPoint] = {}
    trunks: dict[str, LossPoint] = {}
    for point in points:
        other = runs.setdefault(f"{point.run}@{point.tokens:.0f}", point)
        if other is not point:
            raise ValueError(
                f"{where} has the run {point.run} at {point.tokens:,.0f} tokens more than once (losses {other.loss:g} "
                f"and {point.loss:g}). Leave one of the rows."
            )
        first = trunks.setdefault(point.group, point)
        for name in ("learning_rate", "params", "seed", "architecture"):
            one, two = getattr(first, name), getattr(point, name)
            if one != two:
                raise ValueError(
                    f"{where} has the trunk {point.group} at two values of {name}, {one} ({first.run}) and {two} "
                    f"({point.run}). Branches of a trunk share it: give each trunk a name of its own."
                )


def check_flops(points: Iterable[LossPoint], configured: Callable[[LossPoint], float | None], where: str) -> None:
    """Refuse flops that differ from those of the run's configuration by over 1 %.

    Raises:
        ValueError: names the runs with both numbers.
    """
    wrong = []
    for point in points:
        expected = configured(point)
        if expected is not None and abs(point.flops / expected - 1) > TOLERANCE:
            wrong.append(f"  {point.run}: {point.flops:.4g} there, {expected:.4g} by its configuration")
    if wrong:
        raise ValueError(
            f"{where} has flops that are off by over {TOLERANCE:.0%}:\n"
            + "\n".join(wrong)
            + "\nCollect the runs again "
            "with python -m eval.scaling_laws collect, or clear the column flops to have it computed."
        )


def write_points(points: Iterable[LossPoint], path: Path) -> None:
    """Write loss points as CSV, with all columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, as_csv(LossPoint, points).encode())


def holds_points(path: Path) -> bool:
    """Whether a file is a table of `write_points`, of this version or an earlier one, or empty."""
    with path.open("rb") as file:
        header = file.readline().rstrip().decode(errors="replace").split(",")
    return header in ([""], [name for name in COLUMNS if name in header or name not in ADDED])
