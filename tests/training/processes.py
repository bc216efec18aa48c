"""Start programs beside the tests: on several ranks, or as someone at a terminal would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """One thread, no launcher's variables of whoever runs the tests, and the package of this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_ranks(count: int, program: str, *arguments: object) -> str:
    """Run a program of this folder, or a module by its full name, on `count` gloo processes; gives what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    module = program if "." in program else f"{__package__}.{program}"
    return _run([sys.executable, *launcher, "-m", module, *map(str, arguments)])


def run_alone(program: str, *arguments: object) -> str:
    """Run a program of this folder in one process; gives what it printed."""
    return _run([sys.executable, "-m", f"{__package__}.{program}", *map(str, arguments)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
