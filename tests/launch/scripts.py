"""The launch scripts, and stand-ins for the programs that they call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
OF_A_LAUNCHER = (
    "SLURM_",
    "PET_",
    "NNODES",
    "NODE_RANK",
    "RENDEZVOUS",
    "PYTHON",
    "ATTEMPT",
    "PROCESSES_PER_NODE",
    "HF_",
)
"""Beginnings of variables of whoever runs the tests that the scripts would read."""


def environment(**variables: object) -> dict[str, str]:
    """The tests' own environment without a launcher's variables, and with `variables`, of which None removes one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
    kept = kept | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    kept |= {name: str(value) for name, value in variables.items()}
    return {name: value for name, value in kept.items() if value != "None"}


def run_script(script: Path, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a launch script by bash, as Slurm does with its copy, with more environment variables."""
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def stand_in(folder: Path, name: str, body: str) -> Path:
    """Write a program of the given name into a folder: a bash script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path
