"""Background processes that read and tokenize ahead of the training loop.

A worker is a fresh Python program on a pipe, not a fork: the training process has threads (torch, gloo, CUDA) that a
fork would copy in an unusable state. It watches the other end of the pipe: when the training process is gone, killed
included, so is the worker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from xlstm_lm.data.lanes import Lane
from xlstm_lm.data.packing import Row

START = "from xlstm_lm.data.worker import serve; serve()"


def produce(lanes: list[Lane], states: list[dict[str, Any]]) -> Iterator[list[Row]]:
    """The next row of every lane, again and again."""
    streams = [lane.rows(state) for lane, state in zip(lanes, states)]
    while True:
        yield [next(stream) for stream in streams]


class Worker:
    """The training process's end of a worker."""

    def __init__(self, lanes: list[Lane], states: list[dict[str, Any]], prefetch_batches: int) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # The package may lie on a path that only this process knows of.
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        self._process = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        # Sent on a thread: the pipe holds less than this, and the worker begins to read only when it has started.
        work = pickle.dumps((lanes, states, prefetch_batches))
        self._sender = threading.Thread(target=self._send, args=(work,), daemon=True)
        self._sender.start()

    def _send(self, work: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has been closed before it had started
            self._process.stdin.write(work)
            self._process.stdin.flush()

    def __next__(self) -> list[Row]:
        """The next row of every lane of this worker.

        Raises:
            ValueError, ConnectionError: what went wrong with the data, as the worker found it.
            RuntimeError: the worker is gone.
        """
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise RuntimeError(
                f"a data worker ended with exit code {self._process.wait()} (its messages stand above; -9 may mean "
                "that memory ran out: lower data.shuffle_documents or data.prefetch_batches)"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._sender.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def serve() -> None:
    """Run as a worker: lanes come in on standard input, rows go out on standard output."""
    # The training process decides when to stop; Ctrl-C and some launchers' signals reach every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the rows
    lanes, states, prefetch_batches = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    ready: queue.Queue[list[Row] | Exception] = queue.Queue(maxsize=prefetch_batches)
    sender = threading.Thread(target=_send, args=(ready, output), daemon=True)
    sender.start()
    try:
        for rows in produce(lanes, states):
            ready.put(rows)
    except (ValueError, ConnectionError) as error:
        # Only the message travels: the user's mistake needs no trace of ours.
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        ready.put(kind(str(error)))
        sender.join()


def _leave_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _send(ready: queue.Queue[list[Row] | Exception], output: BinaryIO) -> None:
    while True:
        answer = ready.get()
        try:
            pickle.dump(answer, output, protocol=pickle.HIGHEST_PROTOCOL)
            output.flush()
        except BrokenPipeError:
            os._exit(0)
        if isinstance(answer, Exception):
            return
