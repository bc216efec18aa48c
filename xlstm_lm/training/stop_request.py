"""Requests to stop a run: signals, and the time limit of a session."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from xlstm_lm.base.program import SCHEDULERS_WARNING

logger = logging.getLogger("xlstm_lm")

SAVE_SHARE, SAVE_SECONDS = 0.1, 600.0
"""Reserve for the last save before the first one has been timed: a share of training.max_hours, at most so many
seconds."""


class StopRequest:
    """Handler of SIGTERM, SIGUSR1 and Ctrl-C, and of the time limit, which end the run once the step is saved.

    Before the first step of the session is made, there is nothing to save, and a signal ends the run at once: Ctrl-C by
    KeyboardInterrupt, others by SystemExit with 128 plus the signal's number. Later, a second signal ends it at once,
    except SIGUSR1. Signals within a second of the first count as the same request, because launchers forward signals
    that the terminal has already sent to every process.

    As a context manager, it notes SIGUSR1 and leaves the others alone until `handle_all`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, max_hours: float | None = None) -> None:
        """Start the clock of this session.

        Args:
            max_hours: Hours after which the session must have ended, its last save included; None for no limit.
        """
        self.received = 0
        self._first_at = 0.0
        self._began = time.monotonic()
        self._max_hours = max_hours
        self._reserve = 0.0 if max_hours is None else min(SAVE_SHARE * 3600 * max_hours, SAVE_SECONDS)
        self._before: dict[int, object] = {}
        self._ends_at_once = False
        self._step_began: float | None = None
        self._longest_step = 0.0
        self._saves = self._steps = 0

    @property
    def reason(self) -> str:
        """Reason of the request on this rank; empty without one."""
        if self.received:
            return f"{signal.Signals(self.received).name} was received."
        return f"training.max_hours ({self._max_hours:g}) is nearly over." if self._time_is_up() else ""

    @property
    def is_by_hand(self) -> bool:
        """Whether a person stopped the run, which is then not meant to be started again by a script."""
        return self.received == signal.SIGINT

    def step_begins(self) -> None:
        """Note the time of a step, the pace of which decides how early the time limit stops the run."""
        now = time.monotonic()
        if self._step_began is not None and self._steps > 1:  # the first one compiles
            self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now
        self._steps += 1

    def note_only(self) -> None:
        """Let signals no longer end the run at once: there is a step to save, or the run closes what it has opened."""
        self._ends_at_once = False

    def saved(self, seconds: float) -> None:
        """Reserve one and a half times the duration of the longest save for the last one."""
        self._step_began = None
        self._reserve = max(self._reserve if self._saves else 0.0, 1.5 * seconds)
        self._saves += 1

    def _time_is_up(self) -> bool:
        if self._max_hours is None:
            return False
        left = 3600 * self._max_hours - (time.monotonic() - self._began)
        return left <= self._reserve + 2 * self._longest_step

    def __enter__(self) -> StopRequest:
        self._handle(SCHEDULERS_WARNING)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SCHEDULERS_WARNING})
        return self

    def handle_all(self) -> None:
        """Handle all signals, which end the run at once until `note_only`, as does one that was noted before.

        Too early before the monitor of the node watches this process: it may be waiting for one that has gone, where
        Python calls no handler, and a launcher sends SIGTERM to end it.
        """
        for number in self.SIGNALS:
            if number not in self._before:
                self._handle(number)
        self._ends_at_once = True
        if self.received:
            self._end_at_once()

    def _handle(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if number != signal.SIGUSR1 and time.monotonic() - self._first_at > 1:
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
            return
        self.received, self._first_at = number, time.monotonic()
        name = signal.Signals(number).name
        if self._ends_at_once:
            logger.warning("%s: stopping at once, because no step is made yet.", name)
            self._end_at_once()
        elif self._steps:
            logger.warning("%s: finishing this step, then saving. Once more to stop at once.", name)
        else:
            logger.warning("%s: stopping as soon as the run's folder is open.", name)

    def _end_at_once(self) -> None:
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)
