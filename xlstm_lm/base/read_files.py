"""JSON files, read with one message on damage: which file, what is wrong with it, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

Fields = Mapping[str, type | tuple[type, ...]]
"""Keys that an object must have, and the types that their values may have."""
NUMBER = (int, float)
NUMBER_OR_NULL = (int, float, NoneType)
RESTORE = "Restore it from a copy."


@dataclass(frozen=True)
class Line:
    """One line of a file of JSON lines."""

    number: int
    """Counted from 1."""
    content: bytes
    value: dict[str, Any]
    """Empty where there is a problem."""
    problem: str
    """The problem with it; empty if there is none."""
    is_torn: bool
    """True for a damaged last line without its line feed, as a killed writer leaves it."""


def read_json(
    path: Path, fields: Fields | None = None, remedy: str = RESTORE, repeated_keys: bool = False
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        fields: keys that it must have, with their types.
        remedy: a sentence for the user, at the end of the message.
        repeated_keys: whether a key may stand twice, as JSON of others may have it; the last one counts.

    Raises:
        ValueError: the file is missing, empty, cut short or otherwise damaged, or has no such object; names the file.
    """
    try:
        value = _parse(path.read_bytes(), fields or {}, repeated_keys)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from None
    return value


def json_lines(path: Path, fields: Fields, remedy: str = RESTORE) -> list[Line]:
    """Read a file of JSON lines, each with what is wrong with it, blank ones left out.

    Raises:
        ValueError: the file is missing.
    """
    try:
        contents = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. {remedy}") from None
    lines = []
    for number, content in enumerate(contents, start=1):
        if not content.strip():
            continue
        value, problem = {}, ""
        try:
            value = _parse(content, fields)
        except ValueError as error:
            problem = str(error)
        lines.append(Line(number, content, value, problem, is_torn=bool(problem) and number == len(contents)))
    return lines


def _parse(content: bytes, fields: Fields, repeated_keys: bool = False) -> dict[str, Any]:
    """The object that a JSON text stands for.

    Raises:
        ValueError: it is no JSON, or no such object; says why, without a full stop.
    """
    if not content.strip(b"\0 \t\r\n"):
        raise ValueError("it is empty")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=dict if repeated_keys else _object)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_shown(value)}, which is no object with keys")
    for name, types in fields.items():
        if name not in value:
            raise ValueError(f"it has no {name!r}")
        if not isinstance(value[name], types) or isinstance(value[name], bool):
            raise ValueError(f"its {name!r} is {_shown(value[name])}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object as `json` does, but refuse a repeated key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return made


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
