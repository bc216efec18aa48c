"""Errors and lists of names in a line."""

from __future__ import annotations

from collections.abc import Sequence

LOST_CONNECTION = "lost the connection to another"
"""Begin of the message of a process that ends because another one has: the reason is with that one."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some_of(names: Sequence[str], most: int) -> str:
    """The first `most` names, and the number of the others."""
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others
