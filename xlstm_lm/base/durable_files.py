"""Files that are either wholly there after a crash or not at all, and errors that say which disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. What was saved before is intact."""


@contextlib.contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn an OSError of writing below `path` into a RunError that names the path and the space that is left."""
    try:
        yield
    except OSError as error:
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free / 2**20
        cause = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"writing failed ({error})"
        raise RunError(
            f"{path}: {cause}; {free:,.1f} MiB are free there. Checkpoints finished before are intact: make room, or "
            "lower training.keep_checkpoints, and give the same command again to continue from the newest."
        ) from error


def write_durably(path: Path, content: bytes) -> tuple[int, int]:
    """Write a new file through to the disk. Returns its size in bytes and its CRC-32."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content), zlib.crc32(content)


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in place of the file `path`: at any moment it has the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_durably(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's content."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
