"""Names in a run's folder, and how such a folder is told from others. What the files hold is for `xlstm_lm.runs`."""

from __future__ import annotations

import re
from pathlib import Path

from xlstm_lm.base.lease import LEASE_FILE

RUN_NAMES = (
    "config.yaml metrics.jsonl superseded.jsonl samples.jsonl environment.json learning_curve.png libraries.log "
    f"checkpoints wandb wandb.json model.yaml tokenizer imported.json {LEASE_FILE}"
).split()
"""Names in a run's folder that the run writes itself."""
RUN_SECTIONS = {"model", "data", "training", "optimizer", "schedule", "safeguards", "wandb", "deepspeed"}
"""Sections of the config.yaml that every run writes."""
STEP_FOLDER = re.compile(r"step_(\d{8,})")
"""The name of a checkpoint's folder in `checkpoints`, with its step."""


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by step, newest first, damaged ones included."""
    parent = run_dir / "checkpoints"
    found = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def has_metrics(folder: Path) -> bool:
    """Whether a run in a folder has written metrics."""
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def has_trained(folder: Path) -> bool:
    """Whether a run in a folder has checkpoints, damaged ones included, or metrics."""
    return bool(checkpoint_folders(folder)) or has_metrics(folder)


def holds_run(folder: Path) -> bool:
    """Whether a run has at least begun in a folder."""
    return has_trained(folder) or _is_of_a_run(folder / "config.yaml")


def _is_of_a_run(config: Path) -> bool:
    """Whether a config.yaml, damaged or not, has the sections that every run writes."""
    try:
        text = config.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return set(re.findall(r"^(\w+):", text, re.MULTILINE)) >= RUN_SECTIONS
