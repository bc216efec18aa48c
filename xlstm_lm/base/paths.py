"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path that a recipe or flag names, with ~ as the home folder.

    Raises:
        ValueError: it begins with ~NAME and there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no home folder of that name; write ./{text} for a folder here.") from None
