"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path that `text` names, with a leading ~ or ~user replaced by that home folder."""
    return Path(text).expanduser()
