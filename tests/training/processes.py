"""Start programs beside the tests: on several ranks, or as someone at a terminal would."""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 600
"""Seconds after which a program that was started counts as hanging."""


def environment() -> dict[str, str]:
    """One thread, no launcher's variables of whoever runs the tests, and the package of this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_ranks(count: int, program: str, *arguments: object) -> str:
    """Run a program of this folder, or a module by its full name, on `count` gloo processes; gives what it printed."""
    return _fork(count, _module(program), arguments, is_launched=True)


def run_alone(program: str, *arguments: object) -> str:
    """Run a program of this folder in one process; gives what it printed."""
    return _fork(1, _module(program), arguments, is_launched=False)


def launch_ranks(count: int, program: str, *arguments: object) -> str:
    """Run a program as `run_ranks` does, in new processes of torchrun: where their start or end matters."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, "-m", _module(program), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def _module(program: str) -> str:
    return program if "." in program else f"{__package__}.{program}"


def _fork(count: int, module: str, arguments: Sequence[object], is_launched: bool) -> str:
    server = _server(tuple(sorted(_settings().items())))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for path in paths.values():
            path.touch()
        request = {
            "ranks": count,
            "module": module,
            "arguments": [str(each) for each in arguments],
            "is_launched": is_launched,
            "environment": environment(),
            "folder": str(Path.cwd()),
            **{name: str(path) for name, path in paths.items()},
        }
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        assert select.select([server.stdout], [], [], TIMEOUT)[0], f"{module} has not ended after {TIMEOUT} s"
        codes = json.loads(server.stdout.readline())
        printed, errors = (path.read_text(errors="replace") for path in paths.values())
    assert codes == [0] * count, f"exit codes {codes}\n{printed[-4000:]}{errors[-4000:]}"
    return printed


def _settings() -> dict[str, str]:
    """The environment as modules may read it on import."""
    return {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}


@functools.cache
def _server(settings: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The server for an environment, which ends with this process."""
    command = [sys.executable, "-m", f"{__package__}.fork_server"]
    return subprocess.Popen(
        command, env=dict(settings), cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
