"""Processes of this machine, told apart by number and start time, because numbers are used again."""

from __future__ import annotations

import os
from pathlib import Path

STOPPED = "T"
"""State of a process that a signal has stopped."""


def start_of_process(pid: int) -> str:
    """Return when a process started, in a unit of the system; "0" for one that has ended; empty if it is unknown."""
    fields = _stat_of(pid)
    if not fields:
        return ""
    return "0" if fields[0] in "ZX" else fields[19]


def state_of_process(pid: int) -> str:
    """Return the letter that the system has for the state of a process, such as `STOPPED`; empty if it is unknown."""
    return next(iter(_stat_of(pid)), "")


def has_ended(pid: int, started: str) -> bool | None:
    """Whether a process has ended; None where the system does not tell a later one of the same number from it.

    Args:
        pid: Number of the process.
        started: Start of the process, as `start_of_process` gave it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    now = start_of_process(pid)
    return now != started if now else None


def _stat_of(pid: int) -> list[str]:
    """State and numbers of a process, which follow the program's name; empty if they cannot be read."""
    try:
        # The name may hold blanks and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
