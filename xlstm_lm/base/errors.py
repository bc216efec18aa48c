"""Errors in a line."""

from __future__ import annotations

LOST_CONNECTION = "lost the connection to another"
"""Begin of the message of a process that ends because another one has: the reason is with that one."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
