"""A rank's signs of life, and the monitor that acts on their absence."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xlstm_lm.base.import_path import child_environment
from xlstm_lm.base.processes import start_of_process
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.heartbeats import BeatFile
from xlstm_lm.runs.monitor import Watched, WatchedRank

logger = logging.getLogger("xlstm_lm")

CLOSE_SECONDS = 5.0


class Heart:
    """The beats of this rank. As a context manager, it tells the monitor how the rank ends."""

    def __init__(self, run_dir: Path, attempt: int, world: World, limits: dict[str, float | None]) -> None:
        """Begin to beat, and start the monitor of this node on its lowest rank. Collective.

        Args:
            run_dir: Folder of the run.
            attempt: Number of this start of the run.
            world: All processes of the run.
            limits: Seconds that each phase may last; None for no limit.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="xlstm_lm_rank_"))
        pid = os.getpid()
        me = WatchedRank(rank=world.rank, pid=pid, started=start_of_process(pid), folder=str(self._folder))
        self._beats = BeatFile(me.beat_path)
        self._stacks = me.stacks_path.open("w")
        # Its handler is C code: it also writes while the interpreter's lock is held, as in a collective.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._phase, self._step, self._has_stepped = "start", 0, False
        self._beat()

        host = socket.gethostname()
        node = f"{host}_{os.environ.get('GROUP_RANK', '0')}"
        everyone = world.all_gather((node, me))
        here = [rank for its_node, rank in everyone if its_node == node]
        launcher = os.getppid() if "RANK" in os.environ else None
        self._watched = Watched(
            run_dir=str(run_dir),
            attempt=attempt,
            node=node,
            host=host,
            limits=limits,
            ranks=here,
            launcher=launcher,
            launcher_started=start_of_process(launcher) if launcher is not None else "",
            launcher_is_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
            meeting_point=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if len(here) < world.size else "",
        )
        self._monitor: subprocess.Popen[bytes] | None = None
        if min(rank.rank for rank in here) == world.rank:
            self._start_monitor()

    def _start_monitor(self) -> None:
        # In a session of its own: Ctrl-C at a terminal reaches the ranks alone.
        self._monitor = subprocess.Popen(
            [sys.executable, "-P", "-m", "xlstm_lm.runs.monitor", self._watched.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=child_environment(),
            start_new_session=True,
        )

    def step(self, step: int) -> None:
        """Beat at the begin of a step, after `step` steps. The first one of a session is the phase compile."""
        self._phase = "step" if self._has_stepped else "compile"
        self._step, self._has_stepped = step, True
        self._beat()
        if self._monitor and self._monitor.poll() is not None:
            code = self._monitor.returncode
            logger.warning("The monitor of this node ended with code %s; it is started again.", code)
            self._start_monitor()

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Spend the block in another phase, and beat at both ends."""
        before, self._phase = self._phase, phase
        self._beat()
        yield
        self._phase = before
        self._beat()

    def _beat(self) -> None:
        self._beats.write(self._phase, self._step)

    def __enter__(self) -> Heart:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._phase = "failed" if kind else "done"
        self._beat()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        self._beats.close()
        if self._monitor:
            assert self._monitor.stdin is not None
            self._monitor.stdin.close()  # wakes it
            # It waits for other ranks that are still at work, and after a failure for the launcher.
            ends_now = len(self._watched.ranks) == 1 and not (kind and self._watched.launcher_is_torchrun)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._monitor.wait(CLOSE_SECONDS if ends_now else 0.5)
        if len(self._watched.ranks) == 1:
            shutil.rmtree(self._folder, ignore_errors=True)
