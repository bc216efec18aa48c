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
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.import_path import child_environment
from xlstm_lm.data.lanes import Lane, share_readers
from xlstm_lm.data.packing import Row

GO_ON = "Checkpoints are intact: give the same command again to continue from the newest."
START = "from xlstm_lm.data.worker import serve; serve()"


def produce(lanes: list[Lane], states: list[dict[str, Any]]) -> Iterator[list[Row]]:
    """The next row of every lane, again and again."""
    share_readers(lanes, states)
    streams = [lane.rows(state) for lane, state in zip(lanes, states)]
    while True:
        yield [next(stream) for stream in streams]


class Worker:
    """The training process's end of a worker."""

    def __init__(self, lanes: list[Lane], states: list[dict[str, Any]], prefetch_batches: int) -> None:
        # The package may be on a path that only this process has.
        environment = {**child_environment(), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
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
            RunError: the worker is gone, or failed by an error of the program's.
        """
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise RunError(_how_it_ended(self._process.wait())) from None
        if isinstance(answer, _WorkerError):
            # The trace goes where libraries' output goes: it is of use to programmers.
            print(answer.trace, file=sys.stderr)
            raise RunError(f"a data worker failed: {answer.summary}. {GO_ON}")
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


class _WorkerError(Exception):
    """An error in a worker that is not the data's, as the training process is told of it."""

    def __init__(self, summary: str, trace: str) -> None:
        super().__init__(summary, trace)
        self.summary, self.trace = summary, trace


def _how_it_ended(code: int) -> str:
    """A sentence on a worker that has gone without a word."""
    if code == -signal.SIGKILL:
        how = (
            "was killed by SIGKILL, as the system does where memory runs out: lower data.shuffle_documents, "
            "data.prefetch_batches or data.num_workers"
        )
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a data worker {how}. {GO_ON}"


def serve() -> None:
    """Run as a worker: lanes come in on standard input, rows go out on standard output."""
    # The training process decides when to stop; Ctrl-C and some launchers' signals reach every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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
        # Only the message travels: a user's mistake needs no trace.
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        ready.put(kind(str(error)))
    except Exception as error:
        kept = " (memory ran out: lower data.shuffle_documents or data.prefetch_batches)"
        summary = f"{type(error).__name__}: {error}{kept if isinstance(error, MemoryError) else ''}"
        ready.put(_WorkerError(summary, traceback.format_exc()))
    sender.join()
    os._exit(0)  # the interpreter's own end would wait for standard input, which the other thread is reading


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
