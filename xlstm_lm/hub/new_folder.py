"""Folders that appear whole or not at all, and never in place of another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xlstm_lm.base.durable_files import sync_folder


def check_free(out: Path) -> None:
    """Refuse a place where there is something already; for before the long work.

    Raises:
        ValueError: `out` exists and is no empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder.")


@contextmanager
def whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which becomes `out` at the end, or goes away with an error."""
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():  # of one that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        check_free(out)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)
