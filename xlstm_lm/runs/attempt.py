"""One start of a run, recorded in status.json from its beginning to its end."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.durations import utc_now
from xlstm_lm.base.errors import first_line
from xlstm_lm.parallel.process_group import LostProcessError
from xlstm_lm.runs.status import ENDED_AT_ONCE, RunStatus, may_replace, read_status, record_end, write_status

logger = logging.getLogger("xlstm_lm")

KILLED = "It was killed, or its machine was lost: it recorded no end."
FIRST_HAND_SECONDS = 3.0
"""Time that a rank with a lost connection leaves to the rank that caused the loss for a reason of its own."""


class Attempt:
    """This start of a run, on one rank. As a context manager, it records how the start ends.

    Rank 0 records everything. Another rank records only its own end by an error or a signal, because rank 0 may then
    see no more than a lost connection; it can do so once rank 0 has recorded the start. Nothing is recorded in a folder
    that has passed to another process. Before `start`, a failure is recorded only after an earlier attempt, which a
    script could otherwise repeat without end.
    """

    def __init__(self, place: Callable[[], Path], steps: int, number: int | None = None) -> None:
        """Continue the numbers of earlier attempts.

        Args:
            place: Returns the run's folder; raises RunError if it has passed to another process.
            steps: Steps of the whole run.
            number: Rank 0's number of this attempt, for the other ranks; None on rank 0.
        """
        self._place, self._steps, self._is_first = place, steps, number is None
        earlier = self._read() if number is None else None
        self.number = number if number is not None else (earlier.attempt if earlier else 0) + 1
        self._has_begun = False
        self._may_be_repeated = earlier is not None and earlier.state != "finished"
        self._step = earlier.step if earlier else 0
        self._end: tuple[str, str] | None = None

    def start(self, step: int) -> None:
        """Record that the run goes on after a step. For rank 0."""
        self._has_begun, self._step = True, step
        self._record("running", "", requeue=True)

    def saved(self, step: int) -> None:
        """Record a checkpoint. For rank 0."""
        self._step = step
        self._record("running", "", requeue=True)

    def end(self, state: str, reason: str) -> None:
        """Set the state and the reason that are recorded at the end if nothing fails before.

        Args:
            state: finished, stopped or preempted.
            reason: One sentence.
        """
        self._end = state, reason

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._end and self._is_first:
                self._record(*self._end, requeue=self._end[0] == "preempted")
            return
        if isinstance(error, KeyboardInterrupt):
            self._record("stopped", f"Ctrl-C {ENDED_AT_ONCE}")
        elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            name = signal.Signals(error.code - 128).name
            self._record("preempted", f"{name} {ENDED_AT_ONCE}", requeue=True)
        else:
            if isinstance(error, LostProcessError):
                time.sleep(FIRST_HAND_SECONDS)
            # A user's mistake is the same at the next start.
            self._record("failed", first_line(error), requeue=not isinstance(error, ValueError))

    def _record(self, state: str, reason: str, requeue: bool = False) -> None:
        try:
            if self._is_first:
                self._write(state, reason, requeue)
            else:
                record_end(self._place(), self.number, state, reason, requeue)
        except (OSError, RunError, ValueError) as problem:
            logger.warning("The state of the run (%s) cannot be recorded: %s", state, first_line(problem))

    def _write(self, state: str, reason: str, requeue: bool) -> None:
        """Write the state and the attempts so far. For rank 0."""
        if not (self._has_begun or self._may_be_repeated):
            return
        folder, status = self._place(), self._read()
        if status and self._has_begun and not self._may_replace(status, state, reason):
            return
        attempts = self._attempts(status, state, reason)
        status = RunStatus(
            state=state,
            reason=reason,
            step=self._step,
            steps=self._steps,
            attempt=self.number,
            updated=utc_now(),
            attempts=attempts,
            requeue=requeue,
        )
        write_status(folder, status)

    def _may_replace(self, status: RunStatus, state: str, reason: str) -> bool:
        """Whether this attempt owns the status, and no other process has recorded a better reason for its end."""
        if status.attempt != self.number:
            return status.attempt < self.number
        return status.state == "running" or (state != "running" and may_replace(status, reason))

    def _attempts(self, status: RunStatus | None, state: str, reason: str) -> list[dict[str, Any]]:
        """The record of all attempts with the present state of this one."""
        attempts = [dict(each) for each in status.attempts] if status else []
        own = next((each for each in attempts if each.get("attempt") == self.number), None)
        if own is None:
            for each in attempts:
                if each.get("state") == "running":
                    each.update(state="failed", reason=KILLED)
            own = {"attempt": self.number, "from_step": self._step, "host": socket.gethostname(), "started": utc_now()}
            attempts.append(own)
        own.update(state=state, reason=reason, to_step=self._step)
        return attempts

    def _read(self) -> RunStatus | None:
        """The status in the folder; None without one and, with a warning, for a damaged one."""
        try:
            return read_status(self._place())
        except ValueError as problem:
            logger.warning("%s It is written afresh.", problem)
            return None
