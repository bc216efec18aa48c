"""Names in a run's folder, and the signs that tell such a folder from others. `xlstm_lm.runs` reads the files."""

from __future__ import annotations

import re
from pathlib import Path

from xlstm_lm.base.lease import LEASE_FILE

CONFIG = "config.yaml"
"""The resolved configuration; each checkpoint has one, too."""
METRICS = "metrics.jsonl"
SUPERSEDED = "superseded.jsonl"
"""Lines that left metrics.jsonl because the run went on from an earlier step."""
STATUS = "status.json"
"""State of the run for launch scripts: running, finished, stopped, preempted or failed."""
HEARTBEATS = "heartbeats"
"""A folder with the last signs of life of all ranks, a file a node, while the run is at work."""
HANG = "hang"
"""A folder with the Python stacks of ranks whose job was ended because it hung."""
SAMPLES = "samples.jsonl"
ENVIRONMENT = "environment.json"
CURVE = "learning_curve.png"
LIBRARY_LOG = "libraries.log"
LOGS = "logs"
"""A folder with the output of each rank and attempt, which the launch scripts make before the run begins."""
PROFILE = "profile"
"""A folder with traces, tables of operations and memory snapshots."""
HUB_COMMITS = "hub_commits.json"
"""Commits of the data sets on the hub that the run reads."""
WANDB_ID = "wandb.json"
WANDB = "wandb"
"""The folder that Weights & Biases writes to."""
CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""A file in `checkpoints` that names the newest."""
TOKENIZER = "tokenizer"
"""A folder in an imported run and in each checkpoint."""
MODEL_RECIPE = "model.yaml"
ORIGIN = "imported.json"
STATE = "state.json"
"""In a checkpoint: step, counters and the state of the data."""
RANDOM_STATE = "random_rank{:04}.pt"
"""In a checkpoint: states of the random number generators of a rank."""
MANIFEST = "manifest.json"
"""In a checkpoint: sizes and checksums of its files, written last."""

RUN_NAMES = (
    *(CONFIG, METRICS, SUPERSEDED, SAMPLES, ENVIRONMENT, CURVE, LIBRARY_LOG, LOGS, CHECKPOINTS, WANDB, WANDB_ID),
    *(MODEL_RECIPE, TOKENIZER, ORIGIN, LEASE_FILE, STATUS, PROFILE, HEARTBEATS, HANG, HUB_COMMITS),
)
"""Names in a run's folder that the run writes itself."""
RUN_SECTIONS = {"model", "data", "training", "optimizer", "schedule", "safeguards", "wandb", "deepspeed"}
"""Sections of the config.yaml that every run writes."""
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Path of a run's checkpoint of a step, whether it is there or not."""
    return run_dir / CHECKPOINTS / f"step_{step:08}"


def is_kept(step: int, keep_at: list[int], keep_every: int) -> bool:
    """Whether a run with these settings, training.keep_at and training.keep_every, keeps the checkpoint for ever."""
    return step in keep_at or (keep_every > 0 and step % keep_every == 0)


def tokenizer_folder(folder: Path) -> Path:
    """Folder of a model's tokenizer: its folder's own for it, as in a checkpoint, or that folder itself."""
    own = folder / TOKENIZER
    return own if own.is_dir() else folder


def step_in_name(folder: Path) -> int | None:
    """Step that the name of a checkpoint's folder gives; None for any other name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def run_of_checkpoint(folder: Path) -> Path | None:
    """Folder of the run in whose `checkpoints` a folder lies; None where it lies elsewhere."""
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else None


def is_in_a_checkpoints_place(folder: Path) -> bool:
    """Whether a folder is where a run keeps a checkpoint, or the remains of one that a killed writer left."""
    return run_of_checkpoint(folder) is not None and _STEP_FOLDER.search(folder.name) is not None


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """Folders of a run's checkpoints by step, newest first, damaged ones included."""
    parent = run_dir / CHECKPOINTS
    steps = {path: step_in_name(path) for path in (parent.iterdir() if parent.is_dir() else ()) if path.is_dir()}
    found = {step: path for path, step in steps.items() if step is not None}
    return dict(sorted(found.items(), reverse=True))


def has_metrics(folder: Path) -> bool:
    """Whether a run in a folder has written metrics."""
    metrics = folder / METRICS
    return metrics.is_file() and metrics.stat().st_size > 0


def has_trained(folder: Path) -> bool:
    """Whether a run in a folder has checkpoints, damaged ones included, or metrics."""
    return bool(checkpoint_folders(folder)) or has_metrics(folder)


def holds_run(folder: Path) -> bool:
    """Whether a run has at least begun in a folder."""
    return has_trained(folder) or _is_of_a_run(folder / CONFIG)


def _is_of_a_run(config: Path) -> bool:
    """Whether a config.yaml, damaged or not, has the sections that every run writes."""
    try:
        text = config.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return set(re.findall(r"^(\w+):", text, re.MULTILINE)) >= RUN_SECTIONS
