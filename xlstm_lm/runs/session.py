"""Record of each session of a run: its start, first step, command and machine."""

from __future__ import annotations

import sys
from pathlib import Path

from xlstm_lm.base.durations import utc_now
from xlstm_lm.base.machine import environment
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.folder import RunFolder


def record_session(run_dir: Path, world: World, step: int, kernels: dict[str, str]) -> None:
    """Add this session to the environment.json of a run. For rank 0.

    Args:
        run_dir: Folder of the run.
        world: Processes of the session.
        step: Step from which the session starts.
        kernels: Backend of each operation.
    """
    RunFolder(run_dir).add_session(
        {
            "started": utc_now(),
            "from_step": step,
            "command": sys.argv,
            **environment(world.device),
            "processes": world.size,
            "kernels": kernels,
        }
    )
