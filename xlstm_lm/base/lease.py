"""The lease on a folder: one process at a time writes to it, on this machine or on any that shares the file system.

FOLDER/lease.json names the process that holds the folder and is removed when it ends. Where a process was killed, the
file stays behind and is stale:

* A process of the same process table (boot and PID namespace) is looked up, by its start time as well, because process
  numbers are used again.
* One on another machine or in another container cannot be looked up. It touches the file every `BEAT_SECONDS`; without
  a touch for `STALE_SECONDS` it counts as gone. Ages are differences of the file system's own times and of waiting, so
  clocks that differ between machines do not matter. No lock service is needed: `O_EXCL` also holds on NFS.

A holder that was suspended for longer finds at its next `place` that the folder is another's, and stops.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from xlstm_lm.base.durable_files import RunError, disk_errors_explained
from xlstm_lm.base.processes import has_ended, start_of_process

logger = logging.getLogger("xlstm_lm")

LEASE_FILE = "lease.json"
BEAT_SECONDS = 15.0
STALE_SECONDS = 3 * BEAT_SECONDS + 15.0
"""Three missed beats, and the delay with which a network file system may show a fourth."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds, or held, a folder."""

    host: str
    """Name of its machine, for messages."""
    process_table: str
    """Names the boot and PID namespace in which `pid` means something."""
    pid: int
    """Process number in that table."""
    started: str
    """Start time in the unit of that table; distinguishes processes of the same number."""
    since: str
    """When it took the folder, in ISO format."""
    command: str
    """Command line of the process."""

    @classmethod
    def this_process(cls) -> Holder:
        """The process that calls this."""
        return cls(
            host=socket.gethostname(),
            process_table=_process_table(),
            pid=os.getpid(),
            started=start_of_process(os.getpid()),
            since=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(sys.argv),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({textwrap.shorten(self.command, 200)})"

    @property
    def is_this_process(self) -> bool:
        """True for the process that calls this."""
        own = Holder.this_process()
        return (self.process_table, self.pid, self.started) == (own.process_table, own.pid, own.started)

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be looked up from here."""
        if self.process_table != _process_table():
            return None
        return has_ended(self.pid, self.started)


class FolderLease:
    """A folder that this process holds until `release`, or until the end of a `with`."""

    def __init__(self, folder: Path, descriptor: int, made: list[Path]) -> None:
        """Use `take`."""
        self.folder, self._descriptor, self._made = folder, descriptor, made
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> FolderLease:
        """Take a folder, which is made if it is not there; a stale lease is taken over, with a warning.

        Waits up to `STALE_SECONDS` where the holder cannot be looked up from here.

        Raises:
            ValueError: another process holds it, which is named, or it can be neither made nor written to.
            RunError: the disk is full.
        """
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        path = folder / LEASE_FILE
        try:
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    return cls(folder, _create(path), made)
                except FileExistsError:
                    _clear_if_stale(path)
                except FileNotFoundError:  # a process that gave the folder back has removed it
                    continue
        except OSError as error:
            _remove_empty(made)
            raise ValueError(
                f"{folder} can be neither made nor written to ({error.strerror}): choose another folder."
            ) from error
        except BaseException:
            _remove_empty(made)
            raise

    def __enter__(self) -> FolderLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_in_place(self) -> bool:
        """Whether the folder still lies where it was taken, held by this process, as far as can be told."""
        try:
            return _is_at(self._descriptor, self.folder / LEASE_FILE)
        except OSError:
            return True

    def place(self) -> Path:
        """The folder's current path: on Linux it is also found after a move on the same disk.

        Raises:
            RunError: it was deleted or replaced, or another process has taken it over.
        """
        if self.is_in_place:
            return self.folder
        with contextlib.suppress(OSError):
            moved = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            if _is_at(self._descriptor, moved):
                return moved.parent
        here = self.folder / LEASE_FILE
        if not self.folder.exists():
            what = "was deleted or moved away"
        elif here.exists():
            holder = _holder(here)
            is_copy = holder is not None and holder.is_this_process
            what = "was replaced by a copy" if is_copy else f"was taken over by {holder or 'another process'}"
        else:
            what = f"was replaced, or {LEASE_FILE} removed from it"
        raise RunError(
            f"{self.folder} {what} while this process was at work there: it stops, and writes nothing more. What the "
            "folder held before can be continued from where it is now."
        )

    def release(self) -> None:
        """Give the folder back; where this process made it and left it empty, it goes away."""
        self._ended.set()
        self._thread.join(timeout=1.0)  # a file system that hangs must not hang this
        in_place = self.is_in_place
        with contextlib.suppress(OSError, RunError):
            _remove(self.place() / LEASE_FILE, self._descriptor)
        os.close(self._descriptor)
        if in_place or not self.folder.exists():
            _remove_empty(self._made)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def _create(path: Path) -> int:
    """Write the lease of this process; gives the open file.

    Raises:
        FileExistsError: there is one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with disk_errors_explained(path):
            os.write(descriptor, json.dumps(asdict(Holder.this_process()), indent=1).encode())
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _clear_if_stale(path: Path) -> None:
    """Remove the lease of a process that is gone; where it changes meanwhile, leave it to the next look.

    Raises:
        ValueError: the process is alive.
    """
    try:
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)  # or another user's
    except FileNotFoundError:  # it has just been given back
        return
    try:
        holder = _holder(path)
        if holder is None:  # perhaps just being written
            time.sleep(0.2)
            holder = _holder(path)
        gone = holder.is_gone() if holder else None
        if gone is None:
            gone = _falls_silent(path, descriptor, holder)
        if gone is None:
            return
        if not gone:
            raise ValueError(
                f"{path.parent}: another process is at work there: {holder or 'it does not say which'}. Wait until it "
                f"ends, stop it, or choose another folder. If it is certain that it no longer runs, delete {path}."
            )
        if _remove(path, descriptor):
            logger.warning("Taking %s over from a process that is gone: %s", path.parent, holder or "unknown")
    finally:
        os.close(descriptor)


def _falls_silent(path: Path, descriptor: int, holder: Holder | None) -> bool | None:
    """Wait until the lease's holder touches it (False), or has not done so for `STALE_SECONDS` (True).

    None where the lease is given back or changes hands meanwhile.
    """
    age = file_system_time(path.parent) - os.fstat(descriptor).st_mtime
    left = STALE_SECONDS - max(age, 0.0)
    if left > 0:
        logger.warning(
            "%s: waiting up to %.0f s for a sign of life of %s", path.parent, left, holder or "the process there"
        )
    touched, until = _touched(path), time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(min(1.0, left))
        if not _is_at(descriptor, path) or _holder(path) != holder:
            return None
        if _touched(path) != touched:
            return False
    return True


def file_system_time(folder: Path) -> float:
    """Return the time of a folder's file system, which may differ from this machine's, in seconds since 1970.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _touched(path: Path) -> int | None:
    """When a file was changed last, in ns; None if it is not there."""
    try:
        with path.open("rb") as file:  # opened, because NFS keeps times of files that are not
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _holder(path: Path) -> Holder | None:
    """Holder of a lease; None where that cannot be read, as in the moment before it is written."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`.

    Raises:
        OSError: the file system does not say.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            return False
        raise  # a file system that cannot be reached for the moment


def _remove(path: Path, descriptor: int) -> bool:
    """Delete the lease at `path` if it is the open one; gives whether it was. Of several that try, one does."""
    with contextlib.suppress(OSError):  # where the file system has no locks, the next `place` finds out
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if not _is_at(descriptor, path):
        return False
    path.unlink()
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _process_table() -> str:
    """Names the boot and PID namespace of this process, which container and machine may share with no other."""
    if sys.platform != "linux":
        return socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex  # equal to none: processes are told by their signs of life alone
