"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path that a recipe or flag names, with ~ as the home folder.

    Raises:
        ValueError: it is empty, begins with ~NAME where there is no such user, or holds a character that no path has.
    """
    if not str(text).strip(" "):
        raise ValueError(f"{str(text)!r} is no path; give the name of a file or folder.")
    if "\0" in str(text):
        raise ValueError(f"{str(text)!r} is no path: it holds a NUL character.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no home folder of that name; write ./{text} for a folder here.") from None
