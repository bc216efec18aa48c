"""A measurement that outlives its process: a crash or a hang of one contender costs that contender's row, no more.

A broken GPU kernel does not raise: it leaves the device unusable, ends the process or never returns. So on a GPU the
measuring is done in a child process that writes down what it is about to try and what it has measured; the parent
starts another child when one dies or falls silent, and what was being tried then counts as failed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlstm_lm.base.read_files import json_lines

ATTEMPTS = 12
"""Children at most."""


class Journal:
    """Attempts and results of earlier processes, and the file that this one continues; without a path, in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.current: str | None = None
        for line in json_lines(path, {}) if path and path.exists() else ():
            entry = line.value  # empty of a line that a child was killed in
            if "trying" in entry:
                self.current = entry["trying"]
            elif "died" in entry and self.current is not None:
                self.failed.setdefault(self.current, entry["died"])
            elif "done" in entry:
                self.results[entry["done"]] = entry["result"]

    def trying(self, what: str | None) -> None:
        """Record that `what` is about to be tried; None for nothing that could go wrong."""
        self._write({"trying": what})

    def died(self, why: str) -> None:
        """Record that the current attempt has made this process useless."""
        self._write({"died": why})

    def done(self, what: str, result: Any) -> None:
        """Record the `result` of `what`; JSON must be able to hold it."""
        self.results[what] = result
        self._write({"done": what, "result": result})

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def run_in_children(module: str, arguments: list[str], silence: float) -> int:
    """Run `python -m module arguments --journal FILE` under supervision; gives its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        command = [sys.executable, "-m", module, *arguments, "--journal", str(journal), "--begin", str(time.time())]
        return supervise(command, journal, silence)


def supervise(command: list[str], path: Path, silence: float) -> int:
    """Run `command` until it ends by itself, again and again; gives its last exit code.

    A child that adds nothing to its journal, the file `path`, for `silence` seconds is killed. One that fails while it
    tries nothing is not started again.
    """
    for _ in range(ATTEMPTS):
        code, why = _run_once(command, path, silence)
        journal = Journal(path)
        if code == 0 or journal.current is None:
            return code
        if journal.current not in journal.failed:
            journal.died(why or f"the process ended with {code}")
    return code


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_once(command: list[str], path: Path, silence: float) -> tuple[int, str]:
    """Exit code of a child, and why it ended where that was not its own doing."""
    with _ctrl_c_ignored():  # as the child then does: this process alone ends on it, and kills the child
        child = subprocess.Popen(command)
    size, since = -1, time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(0.1)
            now = path.stat().st_size if path.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > silence:
                return 1, f"it did not return within {silence:.0f} s"
    finally:
        child.kill()
        child.wait()
    code = child.returncode
    return (1, f"the process died of {signal.Signals(-code).name}") if code < 0 else (code, "")
