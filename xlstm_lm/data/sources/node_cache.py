"""Bytes of files on the hub, kept on this node's disk: all its processes read what one of them has fetched.

TMPDIR/xlstm_lm-UID/hub_blocks has a folder for each file at one commit, named by a hash of its address. A block in it
is named BEGIN-END-SIZE-CRC: its first byte, the byte after its last, the bytes of the whole file, and its CRC-32.
Processes wait for each other by locks of the system, which releases those of a process that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.durable_files import RunError, replace_durably
from xlstm_lm.base.node_folder import node_local_folder

FOLDER = "hub_blocks"
LOCKS = 1024
"""Number of lock files. Files of the hub that share one by chance are not fetched at the same time."""
LONGEST_WAIT_SECONDS = 300.0
"""Longest wait for another process that fetches, which may have been suspended."""
FREED_SHARE = 1 / 8
"""Share of the limit that is free after blocks were removed: finding the oldest takes a look at all of them."""
BLOCK_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-([0-9a-f]{8})")


class Block(NamedTuple):
    """Successive bytes of a file."""

    begin: int
    """Position of the first byte."""
    content: bytes
    file_bytes: int
    """Bytes of the whole file."""


Fetch = Callable[[int, int], Block]
"""Fetches the bytes from one position up to another, fewer where the file ends."""


class CachedFile:
    """One file at one commit, of which blocks may be on this node's disk."""

    def __init__(self, url: str, limit_bytes: float) -> None:
        """Find the folder; nothing is read yet.

        Args:
            url: Address of the file, with the commit.
            limit_bytes: Limit of the blocks of all files together; with 0 none is read or kept.
        """
        node = node_local_folder() if limit_bytes > 0 else None
        digest = hashlib.sha256(url.encode()).hexdigest()
        self._folder = None if node is None else node / FOLDER / digest
        self._lock = f"lock-{int(digest, 16) % LOCKS}"
        self._limit_bytes = limit_bytes

    def block(self, begin: int, end: int, fetch: Fetch) -> Block:
        """The block with the byte at `begin`: from disk, or fetched up to `end` or up to the next block on disk.

        While a process fetches from a file, others that need bytes of it which are not on disk wait.
        """
        if self._folder is None:
            return fetch(begin, end)
        if block := _read(self._folder, begin):
            return block
        root = self._folder.parent
        try:
            root.mkdir(exist_ok=True)
            lock = FileLock(root / self._lock, timeout=LONGEST_WAIT_SECONDS).acquire()
        except OSError as problem:  # nothing can be written there, or the wait was too long
            _announce(root, problem)
            return fetch(begin, end)
        with lock:
            if block := _read(self._folder, begin):
                return block
            block = fetch(begin, min([end, *(each.begin for each in _list(self._folder) if each.begin > begin)]))
            if block.content:
                _keep(self._folder, block, self._limit_bytes)
        return block


class _Listed(NamedTuple):
    """A block on disk, by its name."""

    begin: int
    end: int
    file_bytes: int
    checksum: int
    path: Path


def _list(folder: Path) -> list[_Listed]:
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    matches = [(BLOCK_NAME.fullmatch(path.name), path) for path in paths]
    return [_Listed(int(m[1]), int(m[2]), int(m[3]), int(m[4], 16), path) for m, path in matches if m]


def _read(folder: Path, position: int) -> Block | None:
    """The block with a position; None if there is none, or only a damaged one, which is removed."""
    for each in _list(folder):
        if not each.begin <= position < each.end:
            continue
        try:
            content = each.path.read_bytes()
        except OSError:  # another process has removed it to make room
            continue
        is_whole = len(content) == each.end - each.begin and zlib.crc32(content) == each.checksum
        with contextlib.suppress(OSError):
            os.utime(each.path) if is_whole else each.path.unlink()
        if is_whole:
            return Block(each.begin, content, each.file_bytes)
    return None


def _keep(folder: Path, block: Block, limit_bytes: float) -> None:
    """Write a block; announces why where that is not possible."""
    end = block.begin + len(block.content)
    name = f"{block.begin}-{end}-{block.file_bytes}-{zlib.crc32(block.content):08x}"
    try:
        with FileLock(folder.parent / "lock", timeout=LONGEST_WAIT_SECONDS):
            _make_room(folder.parent, len(block.content), limit_bytes)
            folder.mkdir(exist_ok=True)
            replace_durably(folder / name, block.content)
    except (OSError, RunError) as error:
        problem = error.__cause__ if isinstance(error, RunError) else error
        assert isinstance(problem, OSError)
        _announce(folder.parent, problem)


def _make_room(root: Path, wanted: int, limit_bytes: float) -> None:
    """Count bytes that are to be written, after removing the blocks that were read least recently where necessary.

    The limit is lower on a full disk: half of the bytes that are free or in blocks.

    Raises:
        OSError: the block is larger than the limit.
    """
    counter = root / "bytes"
    try:
        held = int(counter.read_text(encoding="ascii"))
    except (OSError, ValueError):
        held = _remove_oldest(root, limit_bytes)
    limit = min(limit_bytes, (held + shutil.disk_usage(root).free) / 2)
    if wanted > limit:
        raise OSError(errno.ENOSPC, "a block is larger than the space that it may take")
    if held + wanted > limit:
        held = _remove_oldest(root, min(limit * (1 - FREED_SHARE), limit - wanted))
    counter.write_text(str(held + wanted), encoding="ascii")


def _remove_oldest(root: Path, most_bytes: float) -> int:
    """Remove the blocks read least recently until at most `most_bytes` are left; returns how many are left."""
    files = []
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # a reader has found it damaged and removed it
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= most_bytes:
            break
        path.unlink(missing_ok=True)
        left -= size
        with contextlib.suppress(OSError):  # the folder has other blocks
            path.parent.rmdir()
    return left


def _announce(root: Path, problem: OSError) -> None:
    """Say why blocks are not kept, without names of files: of each reason once."""
    reason = problem.strerror or f"another process has not finished after {LONGEST_WAIT_SECONDS:.0f} s"
    announce_once(f"bytes from the hub are not kept in {root} for the other processes of this node: {reason}")
