"""Types of configuration fields and the values they allow, for pydantic, the classes themselves and argparse."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have: `Annotated[int, Range(1, 10)]`. NaN, infinity and truth values are outside."""

    low: float
    """Lower bound, allowed itself unless `open_below`."""
    high: float
    """Upper bound, allowed itself unless `open_above`."""
    open_below: bool = False
    """Whether `low` itself is excluded."""
    open_above: bool = False
    """Whether `high` itself is excluded."""

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_below else self.low <= number
        return above and (number < self.high if self.open_above else number <= self.high)

    def __str__(self) -> str:
        low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        if not self.open_below and not self.open_above:
            return f"from {low} to {high}"
        above, below = "above" if self.open_below else "of at least", "below" if self.open_above else "at most"
        return f"{above} {low} and {below} {high}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """pydantic's own constraints. Models import this module, so it must not import pydantic."""
        bounds = {
            "gt" if self.open_below else "ge": self.low,
            "lt" if self.open_above else "le": self.high,
        }
        if source is float:
            bounds["allow_inf_nan"] = False
        before = {"type": "no-info", "function": refuse_bool}
        return {"type": "function-before", "function": before, "schema": handler(source) | bounds}


NO_NUMBER = "true and false are no numbers"


def refuse_bool(value: Any) -> Any:
    """Refuse booleans, which pydantic accepts as 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(NO_NUMBER)
    return value


# Upper bounds only keep out what no run can mean; the memory that a run needs is counted before it is built.
Size = Annotated[int, Range(1, 2**20)]
"""Width, number of heads and the like."""
Count = Annotated[int, Range(1, 10**12)]
"""Steps, tokens, documents: at least one."""
CountOrZero = Annotated[int, Range(0, 10**12)]
"""Count where zero stands for never or none."""
VocabSize = Annotated[int, Range(1, 2**31 - 1)]
"""Number of token ids."""
Seed = Annotated[int, Range(0, 2**63 - 1)]
"""Seed of a random generator."""
Positive = Annotated[float, Range(0, 1e9, open_below=True)]
"""Positive number."""
NonNegative = Annotated[float, Range(0, 1e9)]
"""Positive number or zero."""
Factor = Annotated[float, Range(0, 1024, open_below=True)]
"""Width over another width."""
Epsilon = Annotated[float, Range(0, 1)]
"""Small number that keeps a quotient finite."""
Share = Annotated[float, Range(0, 1, open_above=True)]
"""Part of a whole, less than all of it."""
PositiveRatio = Annotated[float, Range(0, 1, open_below=True)]
"""Part of a whole, more than none of it."""
Ratio = Annotated[float, Range(0, 1)]
"""Part of a whole."""


def in_steps(length: float, steps: int) -> int:
    """Steps that a length stands for: an int is their number, a float its share of `steps`, rounded."""
    return round(length * steps) if isinstance(length, float) else length


def words(hint: Any) -> str:
    """The values that a type allows, in words: 'a whole number from 1 to 10 or null'."""
    if get_origin(hint) is Annotated:
        base, *metadata = get_args(hint)
        ranges = [str(each) for each in metadata if isinstance(each, Range)]
        return " ".join([words(base), *ranges])
    parts = get_args(hint)
    if is_union(hint):
        return " or ".join(dict.fromkeys(map(words, parts)))
    if get_origin(hint) is Literal:
        values = [each if isinstance(each, str) else repr(each) for each in parts]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if get_origin(hint) is list:
        return "a list of sections" if is_section(parts[0]) else f"a list, each item {words(parts[0])}"
    if get_origin(hint) is tuple:
        return f"a list of {len(parts)}, each {words(parts[0])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(hint, "a section with fields")


def check_fields(config: Any, section: str = "") -> None:
    """Check the fields of a dataclass against their types: numbers in range, names among those listed.

    Args:
        config: An instance of a dataclass.
        section: Put before the field's name in messages, such as "training.".

    Raises:
        ValueError: A value is not allowed; names the field, the value and what is allowed.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(config, name)
        if not _allows(hint, value):
            raise ValueError(f"{section}{name} is {value!r}; it must be {words(hint)}.")


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _allows(hint: Any, value: Any) -> bool:
    """Whether a value is allowed by what this module checks: numbers, literals, and lists and unions of them."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return _allows(parts[0], value) and all(value in each for each in parts[1:] if isinstance(each, Range))
    if is_union(hint):
        return any(_allows(part, value) for part in parts)
    if get_origin(hint) is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_allows(parts[0], each) for each in value)
    if get_origin(hint) is tuple:
        return len(value) == len(parts) and all(map(_allows, parts, value))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    return value is None if hint is type(None) else True


def is_union(hint: Any) -> bool:
    """Whether a type is a union."""
    return get_origin(hint) in (Union, types.UnionType)


def is_section(hint: Any) -> bool:
    """Whether a type is a class with fields: a dataclass or a TypedDict."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "__total__"))


def argument(hint: Any) -> Callable[[str], int | float]:
    """A number of such a type as argparse's `type`: `parser.add_argument("--steps", type=argument(Count))`."""

    def read(text: str) -> int | float:
        try:
            value = (int if get_args(hint)[0] is int else float)(text)
        except ValueError:
            value = None
        if value is None or not _allows(hint, value):
            raise argparse.ArgumentTypeError(f"{text} must be {words(hint)}")
        return value

    return read
