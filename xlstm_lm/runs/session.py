"""Record of each session of a run: when it began, from which step, and on what machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from xlstm_lm.base.machine import cpu_name, git_commit
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
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "deepspeed", "datasets", "tokenizers", "numpy")
            },
            "platform": platform.platform(),
            "processes": world.size,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "kernels": kernels,
        }
    )
