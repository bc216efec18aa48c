"""Record of each session of a run: when it began, from which step, and on what machine."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from xlstm_lm.base.machine import environment
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.folder import RunFolder


def record_session(run_dir: Path, world: World, step: int, kernels: dict[str, str]) -> None:
    """Add this session to the environment.json of a run. For rank 0.

    Args:
        run_dir: the run's folder.
        world: the processes of the session.
        step: the step that it starts from.
        kernels: the backend of each operation.
    """
    RunFolder(run_dir).add_session(
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_step": step,
            "command": sys.argv,
            **environment(world.device),
            "processes": world.size,
            "kernels": kernels,
        }
    )
