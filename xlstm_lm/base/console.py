"""Terminal output: the current stage of a program and its own messages, without those of other libraries.

Nothing is shown before `open_console`: code called from another program stays silent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger("xlstm_lm")
REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0
"""Between two lines on how far a stage is, where there is no terminal."""


class _Stage:
    """A line on a terminal with a running clock, which goes away at the end."""

    def __init__(self, text: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=0, desc=text, bar_format="{desc}  {elapsed}", file=console(), leave=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            self._bar.refresh()

    def change(self, text: str) -> None:
        self._bar.set_description_str(text, refresh=False)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()


_open = False
_real: tuple[TextIO, TextIO] | None = None  # standard output and error, while those of sys are a library log
_stage: _Stage | None = None
_last_line = 0.0


def is_first_process() -> bool:
    """Whether this is rank 0 of those that a launcher started, or was started alone."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Whether this is the first of the processes that a launcher started on this machine, or was started alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def console() -> TextIO:
    """Standard error, also while that of the libraries goes to a file."""
    return _real[1] if _real else sys.stderr


def output() -> TextIO:
    """Standard output, also while that of the libraries goes to a file."""
    return _real[0] if _real else sys.stdout


def write(text: str) -> None:
    """A line on standard error, above whatever bar is shown. That it cannot be written stops nothing."""
    tqdm = sys.modules.get("tqdm")
    try:
        if tqdm is not None:
            tqdm.tqdm.write(text, file=console())
        else:
            print(text, file=console(), flush=True)
    except OSError:
        send_nowhere(console())


def say(text: str) -> None:
    """A line on standard output. That nobody reads it stops nothing: for results that are kept elsewhere, too."""
    try:
        print(text, file=output(), flush=True)
    except BrokenPipeError:
        send_nowhere(output())


def stage(text: str) -> None:
    """Show what is being done from now on, until the next stage or `end_stage`."""
    global _stage, _last_line
    end_stage()
    if not _open:
        return
    _last_line = time.monotonic()
    if console().isatty():
        _stage = _Stage(text)
    else:
        write(text)


def progress(text: str) -> None:
    """Show how far the stage is: in place on a terminal, elsewhere as a line now and then."""
    global _last_line
    if _stage is not None:
        _stage.change(text)
    elif _open and time.monotonic() - _last_line > LINE_SECONDS:
        _last_line = time.monotonic()
        write(text)


def end_stage() -> None:
    """Take the stage off the terminal."""
    global _stage
    if _stage is not None:
        _stage.end()
        _stage = None


class _Handler(logging.Handler):
    """Our messages: on the console of the first process, in the library log of the others."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process() or _library_log is None:
            write(self.format(record))
        else:
            _library_log.write(f"rank {os.environ['RANK']}: {self.format(record)}\n")


@contextlib.contextmanager
def open_console() -> Iterator[None]:
    """Show stages and the messages of the logger "xlstm_lm" on standard error."""
    global _open
    before, handler = _open, _Handler(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    _open = is_first_process()
    try:
        yield
    finally:
        end_stage()
        logger.removeHandler(handler)
        logger.propagate, _open = propagates, before


class LibraryLog:
    """Standard output and error of other libraries: held in memory until `keep_in` names a file."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._held: list[str] = []
        self._file: TextIO | None = None
        self._lock = threading.Lock()

    def keep_in(self, path: Path) -> None:
        """Write what is held, and all that is to come, to the end of `path`."""
        with self._lock, contextlib.suppress(OSError):  # no run fails for a log of others
            self._file = path.open("a", buffering=1, encoding="utf-8", errors="replace")
            held, self._held = "".join(self._held), []
            if held:
                self._file.write(held)

    def write(self, text: str) -> int:
        with self._lock:
            if self._file is None:
                self._held.append(text)
            else:
                with contextlib.suppress(OSError):
                    self._file.write(text)
        return len(text)

    def held(self) -> str:
        """Output that no file has yet."""
        with self._lock:
            return "".join(self._held)

    def flush(self) -> None:
        """Nothing to do: a line is written as it comes."""

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        """The descriptor of the real standard error, for the output of a library's child process."""
        return console().fileno()

    def __getattr__(self, name: str) -> Any:
        """Anything else that a text stream has."""
        return getattr(console(), name)


_library_log: LibraryLog | None = None


def keep_library_output(path: Path) -> None:
    """Name the file for what `libraries_quieted` collects; without it, nothing happens."""
    if _library_log is not None:
        _library_log.keep_in(path)


@contextlib.contextmanager
def libraries_quieted() -> Iterator[None]:
    """Collect what libraries print, log and warn of, for `keep_library_output`.

    Where the block fails before there is a file, it is shown.
    """
    global _library_log, _real
    log = LibraryLog()
    _library_log, _real = log, (sys.stdout, sys.stderr)
    try:
        # Also for handlers that libraries make of these streams at import.
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    except Exception:
        held = log.held().strip()
        if held and is_first_process():
            write(held)
        raise
    finally:
        _real = None


def send_nowhere(stream: TextIO) -> None:
    """Let a stream that nobody reads any more take everything and keep nothing."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
