"""A process beside the ranks of a node that ends the job when one of them hangs or has gone. Imports no torch.

It depends neither on NCCL nor on the ranks' interpreters. Local rank 0 starts it with a JSON object on the command line
(`Watched`); it ends by itself once all ranks of the node have ended.

* A rank whose phase lasts longer than its limit hangs. The Python stacks of all local ranks go to RUN/hang/, the
  missing rank is named in status.json, and the local ranks are killed. Each node decides for itself, so a cut link
  ends all.
* A rank that has gone, a launcher that has gone, or a failure that another node recorded leaves the others
  `GRACE_SECONDS` to end with messages of their own.
* After a failure, torchrun is killed if it does not end within `LAUNCHER_SECONDS`: it waits for nodes that are cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.durations import duration
from xlstm_lm.base.errors import some_of
from xlstm_lm.base.processes import STOPPED, has_ended, state_of_process
from xlstm_lm.base.run_layout import HANG
from xlstm_lm.runs.heartbeats import (
    ENDED,
    PHASES,
    SILENT_SECONDS,
    SUMMARY_SECONDS,
    Beat,
    Heartbeat,
    read_beat,
    read_heartbeats,
    remove_heartbeats,
    silent_nodes,
    write_heartbeats,
)
from xlstm_lm.runs.status import has_ended_early, read_status, record_end

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0
UNSURE_SECONDS = 5.0
"""Time that a node with a vague reason leaves to the others."""
NAMED = 8
"""Missing ranks that are named at most."""
LAUNCHER_SECONDS = 30.0
"""Time for torchrun to end after a failure. Where the network is cut, it would wait for minutes."""
REACH_SECONDS = 3.0
"""Time for a connection to the meeting point; less than `UNSURE_SECONDS`."""
STACK_SECONDS = 2.0
"""Time for the ranks to write their stacks before they are killed."""


@dataclass(frozen=True, kw_only=True)
class WatchedRank:
    """A rank of this node."""

    rank: int
    pid: int
    started: str
    """Start of the process, as `start_of_process` gives it."""
    folder: str
    """Temporary folder with the rank's files `beat` and `stacks`."""

    @property
    def beat_path(self) -> Path:
        """File of the beats."""
        return Path(self.folder, "beat")

    @property
    def stacks_path(self) -> Path:
        """File to which the rank writes its stacks on SIGUSR2."""
        return Path(self.folder, "stacks")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A job, as seen from one node."""

    run_dir: str
    attempt: int
    node: str
    """Name of the node's summary, unique among the nodes."""
    host: str
    limits: dict[str, float | None]
    """Seconds that a phase may last; None for no limit."""
    ranks: list[WatchedRank]
    launcher: int | None
    """Process that started the ranks and must outlive them; None without one."""
    launcher_started: str
    launcher_is_torchrun: bool
    """Whether the launcher ends by itself once a rank has failed, as long as it can reach the other nodes."""
    meeting_point: str
    """HOST:PORT where rank 0 or its launcher listens as long as the job runs; empty if all ranks are on this node."""

    def to_json(self) -> str:
        """Text for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Watched:
        """Read `to_json`."""
        values = json.loads(text)
        return cls(**values | {"ranks": [WatchedRank(**each) for each in values["ranks"]]})


class Finding(NamedTuple):
    """The end of a watch."""

    reason: str
    """Reason to end the job; empty if all ranks have ended by themselves."""
    is_sure: bool = True
    """Whether no other node can know more."""


class Monitor:
    """The watch over one node's ranks."""

    def __init__(self, watched: Watched, clock: Callable[[], float] = time.monotonic) -> None:
        self.watched, self.run_dir = watched, Path(watched.run_dir)
        self._clock = clock
        self._cause_since: float | None = None
        self._summary_at: float | None = None
        quarters = [limit / 4 for limit in watched.limits.values() if limit is not None]
        self._summary_seconds = min([SUMMARY_SECONDS, *quarters])
        self._first_seen = clock()

    def look(self) -> Finding | None:
        """Look once. Returns how the watch ends, or None to go on."""
        now = self._clock()
        beats = {rank.rank: self._beat(rank) for rank in self.watched.ranks}
        if self._summary_at is None or now - self._summary_at >= self._summary_seconds:
            self._summary_at = now
            with contextlib.suppress(OSError):
                write_heartbeats(self.run_dir, self.watched.node, self.summary())
        unended = [rank for rank in self.watched.ranks if beats[rank.rank][0] not in ENDED]
        working = [rank for rank in unended if _lives(rank.pid, rank.started)]
        gone = [rank for rank in unended if rank not in working]
        if not working:
            return Finding(self._loss_of(gone) if gone else "")
        hanging = [rank for rank in working if self._hangs(beats[rank.rank], now)]
        if hanging:
            return self._missing(hanging[0], beats)
        cause = self._cause_to_end(gone, beats)
        if not cause:
            self._cause_since = None
            return None
        self._cause_since = now if self._cause_since is None else self._cause_since
        return Finding(cause) if now - self._cause_since >= GRACE_SECONDS else None

    def summary(self) -> list[Heartbeat]:
        """Last beats of this node's ranks."""
        offset = time.time() - time.monotonic()
        return [
            Heartbeat(rank=rank.rank, host=self.watched.host, pid=rank.pid, step=step, phase=phase, time=beat + offset)
            for rank in self.watched.ranks
            for phase, step, beat in [self._beat(rank)]
        ]

    def _beat(self, rank: WatchedRank) -> Beat:
        return read_beat(rank.beat_path) or ("start", 0, self._first_seen)

    def _hangs(self, beat: Beat, now: float) -> bool:
        limit = self.watched.limits.get(beat[0])
        return limit is not None and now - beat[2] > limit

    def _loss_of(self, gone: list[WatchedRank]) -> str:
        ranks = ", ".join(f"rank {rank.rank} (process {rank.pid})" for rank in gone)
        return (
            f"{ranks} on {self.watched.host} ended without a message: killed by a signal, as the system does where "
            "memory runs out, or by hand."
        )

    def _cause_to_end(self, gone: list[WatchedRank], beats: dict[int, Beat]) -> str:
        """Reason for which the ranks that work must end; empty if there is none."""
        host, launcher = self.watched.host, self.watched.launcher
        if gone:
            return self._loss_of(gone)
        if launcher is not None and not _lives(launcher, self.watched.launcher_started):
            return f"the launcher (process {launcher} on {host}) was killed."
        failed = [rank for rank, beat in beats.items() if beat[0] == "failed"]
        with contextlib.suppress(OSError, ValueError):
            status = read_status(self.run_dir)
            if status and status.attempt == self.watched.attempt and has_ended_early(status):
                return status.reason
        if failed:
            return f"rank {failed[0]} on {host} failed; its message is in the output of the run."
        return ""

    def _missing(self, hanging: WatchedRank, beats: dict[int, Beat]) -> Finding:
        """Name the rank for which the others wait, as far as can be told."""
        phase, step, beat = beats[hanging.rank]
        how = f"the run hangs: {phase} after step {step:,} has lasted {duration(self._clock() - beat)}"
        stopped = [rank for rank in self.watched.ranks if state_of_process(rank.pid) == STOPPED]
        if stopped:
            names = ", ".join(f"rank {rank.rank} (process {rank.pid})" for rank in stopped)
            return Finding(f"{how}; a signal has stopped {names} on {self.watched.host}.")
        everyone = self.summary()
        with contextlib.suppress(OSError, ValueError):
            everyone += [each for each in read_heartbeats(self.run_dir) if each.rank not in beats]
        places = [(each.step, PHASES.index(each.phase)) for each in everyone]
        behind = [each for each, place in zip(everyone, places, strict=True) if place == min(places)]
        if len(behind) < len(everyone):
            first = behind[0]
            return Finding(f"{how}; missing, in {first.phase} after step {first.step:,}: {_named(behind)}.")
        silent = silent_nodes(self.run_dir, SILENT_SECONDS)
        if silent:
            return Finding(f"{how}; nothing is heard of {', '.join(silent)}.")
        if not self._reaches_the_first_rank():
            return Finding(
                f"{how}; {_named(self.summary())} cannot reach rank 0 at {self.watched.meeting_point}: the network is "
                "cut between them."
            )
        return Finding(
            f"{how}; all ranks stand in the same place, as where the network is cut: see the stacks in {HANG}.",
            is_sure=False,
        )

    def has_failed_rank(self) -> bool:
        """Whether a rank of this node has ended by an error."""
        return any(self._beat(rank)[0] == "failed" for rank in self.watched.ranks)

    def _reaches_the_first_rank(self) -> bool:
        if not self.watched.meeting_point:
            return True
        host, _, port = self.watched.meeting_point.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
        except OSError:
            return False
        return True

    def end_job(self, reason: str) -> None:
        """Record the failure, keep the stacks of the local ranks, and kill those that live."""
        print(f"xlstm-lm monitor: {reason}", file=sys.stderr, flush=True)
        alive = [rank for rank in self.watched.ranks if _lives(rank.pid, rank.started)]
        with contextlib.suppress(OSError, RunError, ValueError):
            record_end(self.run_dir, self.watched.attempt, "failed", reason)
        # A stopped process writes its stacks once it goes on. Before that the others must have written theirs, because
        # it frees them from their wait.
        stopped = [rank for rank in alive if state_of_process(rank.pid) == STOPPED]
        for number, ranks in ((signal.SIGUSR2, alive), (signal.SIGCONT, stopped)):
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)
            if ranks:
                time.sleep(STACK_SECONDS)
        self._keep_stacks(alive, reason)
        for rank in alive:
            if _lives(rank.pid, rank.started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)

    def end_launcher(self) -> None:
        """Kill torchrun if it does not end after the failure of a rank of this node."""
        launcher, started = self.watched.launcher, self.watched.launcher_started
        if launcher is None or not self.watched.launcher_is_torchrun:
            return
        until = self._clock() + LAUNCHER_SECONDS
        while _lives(launcher, started) and self._clock() < until:
            time.sleep(POLL_SECONDS)
        if _lives(launcher, started):
            print(f"xlstm-lm monitor: torchrun (process {launcher}) does not end: killed.", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher, signal.SIGKILL)

    def _keep_stacks(self, ranks: list[WatchedRank], reason: str) -> None:
        if not self.run_dir.is_dir():
            return
        folder = self.run_dir / HANG
        with contextlib.suppress(OSError):
            for rank in ranks:
                folder.mkdir(exist_ok=True)
                stacks = rank.stacks_path.read_text(errors="replace")
                name = f"attempt_{self.watched.attempt:04}_rank_{rank.rank:04}.txt"
                (folder / name).write_text(f"{reason}\n\nrank {rank.rank} on {self.watched.host}:\n{stacks}")

    def close(self) -> None:
        """Remove the files of the watch."""
        remove_heartbeats(self.run_dir, self.watched.node)
        for rank in self.watched.ranks:
            shutil.rmtree(rank.folder, ignore_errors=True)


def watch(watched: Watched) -> None:
    """Watch until the ranks of this node have ended. The rank that started the watch wakes it by closing the pipe."""
    monitor = Monitor(watched)
    pipe_is_open = True
    while True:
        found = monitor.look()
        if found is not None:
            break
        if pipe_is_open:
            pipe_is_open = not select.select([sys.stdin], [], [], POLL_SECONDS)[0]
        else:
            time.sleep(POLL_SECONDS)
    if found.reason:
        if not found.is_sure:
            time.sleep(UNSURE_SECONDS)
        monitor.end_job(found.reason)
    has_failed = bool(found.reason) or monitor.has_failed_rank()
    monitor.close()
    if has_failed:
        monitor.end_launcher()


def _named(ranks: list[Heartbeat]) -> str:
    """The first few ranks, each with its host."""
    return some_of([f"rank {each.rank} on {each.host}" for each in ranks], NAMED)


def _lives(pid: int, started: str) -> bool:
    return not has_ended(pid, started)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # launchers signal every process of a job
    watch(Watched.from_json(sys.argv[1]))
