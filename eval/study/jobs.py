"""Run several processes at once, each with a log of its own; none of them outlives this one."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from xlstm_lm.base.lease import FolderLease
from xlstm_lm.base.outputs import check_folder_of_runs

POLL_SECONDS = 0.1
GRACE_SECONDS = 600.0
"""Between asking a process to stop and killing it."""
SHOWN_LINES = 12
"""Lines shown from the end of a failed job's log."""
PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True)
class Job:
    """A command to run."""

    name: str
    command: list[str]
    log: Path
    """File that the job's output is appended to."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables on top of those of this process."""


@dataclass(kw_only=True)
class Outcome:
    """The end of a job."""

    name: str
    code: int
    """Exit code; minus the signal that ended the job."""
    seconds: float
    asked_to_stop: bool
    """Whether it was told to stop: then a code of 0 does not imply that the job is complete."""
    last_lines: str
    """End of the job's output."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder.

    Raises:
        ValueError: one is there, or the folder is (part of) a run, a checkpoint, a model or a tokenizer.
    """
    check_folder_of_runs(folder)
    with FolderLease.take(folder):
        yield


def run_jobs(
    jobs: Iterable[Job],
    at_once: int,
    *,
    then: Callable[[Outcome], Sequence[Job]] = lambda outcome: (),
    max_seconds: float | None = None,
) -> dict[str, Outcome]:
    """Run jobs, `at_once` of them at a time, and give how each one that was begun has ended.

    A job that fails is shown with the end of its log, and the others go on. On SIGTERM, on Ctrl-C and when the time is
    up, no job is begun any more and the running ones get SIGTERM, on which a training run saves; a second signal, or
    too long a wait, kills them. A process that outlives its job is killed. Where this process is itself killed, Linux
    sends its jobs SIGTERM.

    A job has one thread on a CPU. Of several at once on a machine with GPUs each sees one of them, in turn.

    Args:
        jobs: what to run, in this order.
        at_once: how many processes at a time.
        then: jobs that the end of one makes possible; they come before those that wait.
        max_seconds: for all of it.

    Raises:
        ValueError: `at_once` is below 1, or two jobs have one name.
    """
    if at_once < 1:
        raise ValueError(f"{at_once} jobs at once is none; give 1 or more.")
    waiting = collections.deque(jobs)
    outcomes: dict[str, Outcome] = {}
    running: dict[int, _Process] = {}
    deadline = time.monotonic() + max_seconds if max_seconds is not None else float("inf")
    with _Signals() as signals, contextlib.ExitStack() as stack:
        stack.callback(lambda: [process.kill() for process in running.values()])
        while running or (waiting and not signals.count and time.monotonic() < deadline):
            stopping = signals.count > 0 or time.monotonic() >= deadline
            for slot in set(range(at_once)) - running.keys() if not stopping else ():
                if waiting:
                    job = waiting.popleft()
                    if job.name in outcomes or any(job.name == each.job.name for each in running.values()):
                        raise ValueError(f"Two jobs are called {job.name}; give each a name of its own.")
                    _say(f"{job.name} begins, {len(waiting)} waiting; its output: {job.log}")
                    running[slot] = _Process(job, _environment(slot, at_once))
            for process in running.values():
                if stopping:
                    process.ask_to_stop()
                if signals.count > 1 or process.is_late():
                    process.kill()
            for slot in [slot for slot, process in running.items() if process.has_ended()]:
                outcome = running.pop(slot).outcome()
                outcomes[outcome.name] = outcome
                _tell(outcome)
                waiting.extendleft(reversed(then(outcome)))
            time.sleep(POLL_SECONDS)
    return outcomes


class _Process:
    """A job while it runs, the first process of a group of its own."""

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        self.job = job
        self._begin = time.monotonic()
        self._asked: float | None = None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_begin = job.log.stat().st_size if job.log.exists() else 0
        with job.log.open("ab") as log:
            self._child = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | job.environment,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on
                preexec_fn=_die_with_the_parent(os.getpid()),
            )

    def ask_to_stop(self) -> None:
        """SIGTERM, once."""
        if self._asked is None:
            self._asked = time.monotonic()
            self._child.terminate()

    def is_late(self) -> bool:
        return self._asked is not None and time.monotonic() - self._asked > GRACE_SECONDS

    def has_ended(self) -> bool:
        """Whether the first process has ended; its id stays in use, since it names the rest of the group."""
        if self._child.returncode is not None:  # killed, and its number free again
            return True
        return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> int:
        """Kill the rest of the group; return the exit code of its first process."""
        if self._child.returncode is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        return self._child.wait()

    def outcome(self) -> Outcome:
        """The outcome of a process that has ended."""
        code = self.kill()
        with self.job.log.open("rb") as log:
            log.seek(max(self._log_begin, self.job.log.stat().st_size - 20_000))
            lines = log.read().decode(errors="replace").splitlines()
        return Outcome(
            name=self.job.name,
            code=code,
            seconds=time.monotonic() - self._begin,
            asked_to_stop=self._asked is not None,
            last_lines="\n".join(lines[-SHOWN_LINES:]),
        )


class _Signals:
    """Counts SIGTERM and Ctrl-C while entered."""

    def __enter__(self) -> _Signals:
        self.count = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        what = "the running jobs save and stop; once more to kill them" if self.count == 1 else "killing the jobs"
        _say(f"{signal.Signals(number).name}: {what}.")


def _environment(slot: int, at_once: int) -> dict[str, str]:
    """A GPU for the job in this slot, or one thread where there is none."""
    count = torch.cuda.device_count()
    if not count:
        return {"OMP_NUM_THREADS": "1"}
    if at_once == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}


def _die_with_the_parent(parent: int) -> Callable[[], None] | None:
    """The first act of a new process on Linux: register for SIGTERM on the death of `parent`."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _tell(outcome: Outcome) -> None:
    took = f"after {int(outcome.seconds) // 60} min {int(outcome.seconds) % 60} s"
    if outcome.code == 0:
        _say(f"{outcome.name} {'has stopped' if outcome.asked_to_stop else 'ends'} {took}")
    elif outcome.asked_to_stop:
        _say(f"{outcome.name} was stopped {took}")
    else:
        lines = "\n".join(f"    {line}" for line in outcome.last_lines.splitlines())
        _say(f"{outcome.name} fails with code {outcome.code} {took}; the end of its output:\n{lines}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
