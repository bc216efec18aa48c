"""Begin and end of a command: one message and the right exit code, whatever stops it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from xlstm_lm.base import console
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.errors import first_line

MISTAKE, FAILURE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 1, 128 + 2, 128 + 13, 128 + 15
"""Exit codes: a mistake of the user, a run that cannot go on, Ctrl-C, output that nobody reads, SIGTERM."""


def told_once(error: BaseException) -> BaseException:
    """Mark an error that every process of a run has: only the first one tells it."""
    error.told_once = True  # type: ignore[attr-defined]
    return error


SCHEDULERS_WARNING = signal.SIGUSR1
"""Signal by which schedulers and launch scripts announce the end of a job's time."""


@contextlib.contextmanager
def warning_held_back() -> Iterator[None]:
    """Keep the scheduler's warning waiting until someone handles it, where it would otherwise end the process.

    Threads and processes started meanwhile do not receive it either. Not to be entered beside other threads, any of
    which would receive it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {SCHEDULERS_WARNING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Run the work of a command line. `name` begins each message.

    ValueError and OSError end with exit code 2, RunError and a lack of memory with 1, each with one message;
    XLSTM_LM_TRACEBACK=1 shows where they come from. Ctrl-C, SIGTERM and a closed pipe end with 130, 143 and 141, after
    cleaning up.
    """
    _write_what_the_terminal_cannot()
    with console.open_console(), _signals_unwind():
        try:
            try:
                yield
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once more would end in a traceback of the exit's own
            _end(INTERRUPTED, f"{name}: interrupted")
        except (ValueError, OSError, RunError) as error:
            if os.environ.get("XLSTM_LM_TRACEBACK"):
                raise
            if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
                _end(BROKEN_PIPE)
            code = FAILURE if isinstance(error, RunError) else MISTAKE
            if console.is_first_process():
                _end(code, f"{name}: {error}")
            _end(code, None if hasattr(error, "told_once") else f"{name}, rank {os.environ['RANK']}: {error}")
        except (RuntimeError, MemoryError) as error:
            from xlstm_lm.base.machine import is_out_of_memory  # slow to import

            if not is_out_of_memory(error) or os.environ.get("XLSTM_LM_TRACEBACK"):
                raise
            remedy = "lower the batch size, close other programs, or use a machine with more"
            _end(FAILURE, f"{name}: out of memory: {remedy}. ({first_line(error)})")


def _end(code: int, message: str | None = None) -> None:
    console.end_stage()
    # What is left in the buffer comes before the message, and cannot fail a second time at exit.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        console.send_nowhere(sys.stdout)
    if message and (code != INTERRUPTED or console.is_first_process()):
        console.write(message)
    raise SystemExit(code)


def _write_what_the_terminal_cannot() -> None:
    """A character that standard output has no bytes for becomes a question mark instead of an error."""
    # In the C locale Python writes back the bytes that it could not read, but no other character.
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM unwind the stack: no file stays half-written.

    SIGTERM not under a launcher: there a process may be waiting for one that is gone, where no handler of Python's
    runs. A Ctrl-C that is ignored, as in a shell's background jobs, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(TERMINATED)

    before = {}
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    if "RANK" not in os.environ:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nobody_reads(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError):
        return False
