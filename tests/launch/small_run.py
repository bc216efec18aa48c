"""A run of a few dozen short steps, which the launch tests disturb and compare with one that nobody disturbed."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.launch.scripts import LAUNCH, REPOSITORY, environment
from tests.training.runs import write_text

STEPS = 40


def write_recipe(folder: Path) -> Path:
    """Write text and a recipe of a small model on it, for runs on two processes."""
    folder.mkdir(exist_ok=True)
    write_text(folder)
    recipe = {
        "model": {"vocab_size": 257, "embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "pattern": "mlstm"},
        "data": {
            "context_length": 256,
            "global_batch_size": 8,
            "sources": [{"kind": "text_lines", "paths": [str(folder / "train.txt")]}],
            "num_workers": 1,
        },
        "training": {
            "steps": STEPS,
            "log_every": 1,
            "checkpoint_every": 10,
            "validate_every": 0,
            "gate_statistics_every": 0,
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def variables(folder: Path, **more: object) -> dict[str, str]:
    """Environment of a launch: this Python, one process a node, compiled kernels where the machine has them already."""
    extensions = Path.home() / ".cache" / "torch_extensions"
    here = {"TMPDIR": folder, "TORCH_EXTENSIONS_DIR": extensions, "OMP_WAIT_POLICY": "PASSIVE", "PROCESSES_PER_NODE": 1}
    return environment(**here | more)


@functools.cache
def undisturbed_losses(folder: Path) -> dict[int, float]:
    """Losses by step of the recipe in `folder` on two processes of one machine."""
    run = folder / "undisturbed"
    words = [LAUNCH / "torchrun.sh", run, "--config", folder / "recipe.yaml"]
    settings = variables(folder) | {"PROCESSES_PER_NODE": "2"}
    done = subprocess.run(
        list(map(str, words)), env=settings, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return losses(run)


def losses(run: Path) -> dict[int, float]:
    """Training losses of a run by step; of a step that was taken twice, the later."""
    return {line["step"]: line["loss"] for line in lines_of(run) if line.get("split") == "train"}


def lines_of(run: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl, none before it has any."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def status_of(run: Path) -> dict:
    """The run's status.json."""
    return json.loads((run / "status.json").read_text())


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it has not come true within `seconds`.
    """
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


if __name__ == "__main__":
    print(len(undisturbed_losses(write_recipe(Path(sys.argv[1])).parent)))
