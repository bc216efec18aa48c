"""The files that a source names, each once and in one order."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.paths import user_path
from xlstm_lm.data.sources.config import SourceConfig
from xlstm_lm.data.sources.places import is_remote, list_urls, size_of
from xlstm_lm.data.sources.record import ORDER

# Not text a person would read first: tests hold files that are broken on purpose, site-packages is not the library.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_HELD_OUT = 16


def list_files(config: SourceConfig, order: int = ORDER) -> list[str]:
    """Files that the paths of a local source name, sorted, each once (in order 1: each name once).

    Raises:
        ValueError: a path or pattern without a file; a file that must not be looked at; a link to nothing or an empty
            file, unless bad documents are skipped.
    """
    try:
        return _list_files(config, order)
    except OSError as error:
        raise ValueError(f"data file {error.filename} cannot be looked at ({error.strerror})") from error


def _list_files(config: SourceConfig, order: int) -> list[str]:
    found: set[str] = set()
    for pattern in map(_at_home, config.paths):
        if is_remote(pattern):
            urls = list_urls(pattern)
            if not urls:
                raise ValueError(f"data file {pattern} is missing: no file matches it")
            found.update(urls)
            continue
        matches = _matches(pattern, order)
        files = [path for path in matches if Path(path).is_file()]
        broken = [path for path in matches if Path(path).is_symlink() and not Path(path).exists()]
        if broken and config.on_bad_document == "error":
            raise ValueError(
                f"data file {broken[0]} is a link to {os.readlink(broken[0])}, which does not exist: repair or remove "  # noqa: PTH115
                "it, or set on_bad_document: skip for this source"
            )
        if broken:
            announce_once(f"{config.description}: {len(broken)} links to nothing are skipped; the first: {broken[0]}")
        elif not files and Path(pattern).is_dir():
            raise ValueError(f"{pattern} is a folder: name the files in it, such as {pattern.rstrip('/')}/*.txt")
        elif not files and matches and not all(Path(path).is_dir() for path in matches):
            raise ValueError(f"{matches[0]} is no regular file (a pipe or device): write its content to a file")
        elif not files:
            raise ValueError(f"data file {pattern} is missing: no file matches it (in {Path.cwd()})")
        found.update(files)
    if not found:
        raise ValueError(f"{config.description}: no file is left")
    remote = {path for path in found if is_remote(path)}
    paths = sorted(found) if order == 1 else sorted({*_distinct(sorted(found - remote), config), *remote})
    for path in paths:
        if config.on_bad_document == "error" and size_of(path) == 0:
            raise ValueError(f"data file {path} is empty: remove it, or set on_bad_document: skip for this source")
    return paths


def _at_home(pattern: str) -> str:
    """The pattern with a leading ~ as the home folder, unless a file is called so."""
    if not pattern:
        raise ValueError("paths of a source hold an empty name: name files or patterns such as data/*.txt")
    if not pattern.startswith("~") or os.path.lexists(pattern):
        return pattern
    return str(user_path(pattern))


def _matches(pattern: str, order: int) -> list[str]:
    """Paths that a pattern matches; any part of it that exists by its literal name, such as [old], stands for that."""
    if order == 1 and (matches := glob.glob(pattern, recursive=True)):  # noqa: PTH207
        return matches
    if os.path.lexists(pattern):
        return [pattern]
    parts = Path(pattern).parts
    for count in range(len(parts) - 1, 0, -1):
        folder = Path(*parts[:count])
        if folder.exists():
            pattern = str(Path(glob.escape(str(folder)), *parts[count:]))
            break
    return glob.glob(pattern, recursive=True)  # noqa: PTH207


def _distinct(paths: list[str], config: SourceConfig) -> list[str]:
    """One name for each file, of the fewest folders the first: a link is no second file."""
    names: dict[tuple[int, int], str] = {}
    others = []
    for path in sorted(paths, key=lambda path: len(Path(path).parts)):  # a link to a folder above gives endless names
        status = Path(path).stat()
        first = names.setdefault((status.st_dev, status.st_ino), path)
        if os.path.abspath(first) != os.path.abspath(path):  # noqa: PTH100
            others.append(f"{path} is the same file as {first} and is read once")
    if others:
        more = f"; {len(others) - 1} more such names" if len(others) > 1 else ""
        announce_once(f"{config.description}: {others[0]}{more}")
    return sorted(names.values())


def stdlib_files(split: str) -> tuple[list[str], list[str]]:
    """Names and paths of the standard library's files of a split. Held out by name alone: splits never overlap.

    Raises:
        ValueError: this Python comes without them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]  # site-packages can be very large
        paths = [Path(folder) / name for name in files if name.endswith(".py")]
        names += [path.relative_to(root).as_posix() for path in paths if path.stat().st_size > 0]
    if not names:
        raise ValueError(
            f"no Python source files in {root}: this Python comes without its standard library's source; "
            "use a source of kind text with files of yours"
        )
    digests = {name: hashlib.sha256(name.encode()).digest() for name in names}
    held_out = {name for name in names if digests[name][0] % STDLIB_HELD_OUT == 0}
    if split == "validation":
        # In the order of the digests, the first few are a fair sample.
        names = sorted(held_out, key=digests.__getitem__)
    else:
        names = sorted(set(names) - held_out)
    return names, [str(root / name) for name in names]
