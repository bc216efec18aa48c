"""Train on two ranks, of which the second comes to grief in the fifth step, or is warned in the first; for torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.training.runs import configure
from xlstm_lm.base.program import program
from xlstm_lm.runs import checkpoint_writer
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.loop import train

LAST_GOOD = 4


def kill_data_workers() -> None:
    """Kill the child processes that read data for this one."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"data.worker" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:
            continue


def die_in_the_next_save() -> None:
    """Get killed in the background part of the next save, in which this rank writes its share."""

    def deadly(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_writer.write_shares = deadly


def stop() -> None:
    """Stop this process by a signal. Continued for its stacks, it would finish so short a run before it is ended."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


FATES = {
    "stopped": stop,
    "asleep": lambda: time.sleep(600),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "worker": kill_data_workers,
    "launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "error": lambda: [][1],
    "saving": die_in_the_next_save,
    "warned": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


def main(fate: str, folder: str, overrides: str) -> None:
    step = TrainingEngine.train_step
    steps, last_good = 0, 0 if fate == "warned" else LAST_GOOD

    def fated(engine, *arguments, **options):
        nonlocal steps
        steps += 1
        if steps > last_good:
            if fate == "all":
                os.kill(os.getpid(), signal.SIGKILL)
            if engine.world.rank == 1 and steps == last_good + 1:
                FATES[fate]()
            if fate == "launcher":
                time.sleep(6)  # longer in all than the monitor waits for the ranks to end by themselves
        return step(engine, *arguments, **options)

    TrainingEngine.train_step = fated
    with program("hanging"):
        train(configure(Path(folder), **json.loads(overrides)))


if __name__ == "__main__":
    main(*sys.argv[1:])
