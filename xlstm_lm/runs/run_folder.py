"""A run's folder: what is in it, and whether a run may go on in it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.parallel.process_group import World
from xlstm_lm.recipe import dotted_items, with_current_names
from xlstm_lm.runs.checkpoint import checkpoint_folders

FREE_TO_CHANGE = (
    "training.steps",
    "training.run_dir",
    "training.resume",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
    "training.gate_statistics_every",
    "training.micro_batch_size",
    "training.precision",
    "training.activation_checkpointing",
    "safeguards.",
    "wandb.",
    "deepspeed.",
    "data.num_workers",
    "data.prefetch_batches",
    "model.chunk_length",
    "model.mlstm_backend",
    "model.slstm_backend",
    "model.scan_backend",
)
"""Fields, or with a dot at the end sections, that may differ when a run goes on: they say how it is computed and
reported, not what is computed."""

FREE_WHEN_BRANCHING = (*FREE_TO_CHANGE, "optimizer.", "schedule.", "data.validation")
"""Fields that may differ when a run starts from another run's checkpoint."""


def differing_fields(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """One line for each field of the two configurations that differs and is not in `free`."""
    old, new = dotted_items(with_current_names(before)), dotted_items(now)
    return [
        f"  {name}: {old.get(name, 'not set')!r} there, {new.get(name, 'not set')!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not f"{name}.".startswith(free) and not name.startswith(free)
    ]


def check_same_run(folder: Path, config: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> None:
    """Refuse to go on from `folder/config.yaml` (of a run or a checkpoint) with another configuration.

    Of an imported model that file has the model's section alone, and nothing else is compared.

    Raises:
        ValueError: names each field that differs, with both values.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds a run but no config.yaml; restore it, or choose another training.run_dir.")
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    different = differing_fields(before, {section: config[section] for section in before if section in config}, free)
    if different and before.keys() == {"model"}:
        raise ValueError(
            f"{folder} holds an imported model, which is not the one that the recipe describes:\n"
            + "\n".join(different)
            + "\nGive the recipe that the import wrote, model.yaml in its folder, as the last --config."
        )
    if different:
        raise ValueError(
            f"{folder} belongs to a run with another configuration:\n"
            + "\n".join(different)
            + "\nSet these fields back to continue it, or choose another training.run_dir for a new run."
        )


def open_run_folder(run_dir: Path, config: dict[str, Any], config_yaml: str, resume: str) -> None:
    """Create the run's folder, or check that the run in it is this one, and write config.yaml. For rank 0.

    A run that wrote nothing yet is no run, and an imported model, the checkpoint of step 0, is none yet.

    Raises:
        ValueError: the folder is a file, or belongs to another configuration, or to any run where resume is never.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"training.run_dir {run_dir} is a file; choose a folder.")
    metrics = run_dir / "metrics.jsonl"
    checkpoints = checkpoint_folders(run_dir)
    has_run = any(checkpoints) or (metrics.is_file() and metrics.stat().st_size > 0)
    if has_run and resume == "never":
        raise ValueError(
            f"{run_dir} already holds a run, and training.resume is never: choose another training.run_dir, delete "
            "that folder, or continue it with --training.resume auto."
        )
    if has_run:
        check_same_run(run_dir, config)
    elif checkpoints:
        check_same_run(checkpoints[0], config)
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_durably(run_dir / "config.yaml", config_yaml.encode())


def is_finished(config: dict[str, Any]) -> bool:
    """Whether the run of this configuration has a checkpoint, in its folder, of its last step.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """
    run_dir = Path(config["training"]["run_dir"])
    steps = checkpoint_folders(run_dir)
    if steps:
        check_same_run(run_dir, config)
    return max(steps, default=-1) >= config["training"]["steps"]


def record_environment(run_dir: Path, world: World, step: int, kernels: dict[str, str]) -> None:
    """Add what this session runs on to environment.json, which lists every session of the run."""
    path = run_dir / "environment.json"
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.is_file() else []
    except (ValueError, KeyError):
        sessions = []
    sessions.append(
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
    replace_durably(path, json.dumps({"sessions": sessions}, indent=2).encode())


def git_commit() -> str | None:
    """The commit of the source that runs, with -dirty where it was edited; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"
