"""Files that are either wholly there after a crash or not at all, and errors that say which disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. What was saved before is intact."""


@contextlib.contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn an OSError of writing below `path` into a RunError that names the path, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: {_cause_and_remedy(error, path)}, and give the same command again. What was finished before, "
            "checkpoints included, is intact."
        ) from error


def _cause_and_remedy(error: OSError, path: Path) -> str:
    named = error.filename2 or error.filename  # of a renaming the new name
    place = Path(named) if isinstance(named, (str, Path)) else path
    if error.errno == errno.ENOSPC:
        existing = path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        there = os.statvfs(existing)
        free = there.f_bavail * there.f_frsize / 2**20
        if there.f_files and not there.f_favail:
            return f"the disk has room for no more files ({free:,.1f} MiB are free there): delete some"
        return f"the disk is full; {free:,.1f} MiB are free there: make room"
    remedies = {
        errno.EDQUOT: "your quota of the disk is used up: make room, or have it raised",
        errno.EFBIG: "the file is larger than the system allows (ulimit -f, or the file system): raise that limit",
        errno.EACCES: f"no permission to write {place}: allow it, or choose another folder",
        errno.EPERM: f"no permission to write {place}: allow it, or choose another folder",
        errno.EROFS: "the disk can only be read: mount it for writing, or choose another folder",
        errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter one",
        errno.ENOENT: f"{place} is gone; it was deleted or renamed: put it back",
        errno.ENOTDIR: f"a part of {place} is a file, not a folder: move it away, or choose another folder",
        errno.EISDIR: f"{place} is a folder, where a file belongs: move it away",
        errno.EMFILE: "too many files are open (ulimit -n): raise that limit",
        errno.EIO: "the disk fails to read or write: repair it, or choose another folder",
        errno.ESTALE: "the network disk has lost the file: mount it again",
    }
    return remedies.get(error.errno or 0, f"writing failed ({error}): remove the cause")


def write_durably(path: Path, content: bytes) -> tuple[int, int]:
    """Write a new file through to the disk. Returns its size in bytes and its CRC-32."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content), zlib.crc32(content)


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in place of the file `path`: at any moment it has the old content or the new.

    Raises:
        RunError: it cannot be written; names the file, the cause and the remedy.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors_explained(path):
        try:
            write_durably(temporary, content)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
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
