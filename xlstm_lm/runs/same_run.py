"""Rules for going on with a run: which fields may differ, and which run a recipe belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlstm_lm.base.fields import in_steps
from xlstm_lm.base.outputs import contents
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.recipe import dotted_items, with_current_names
from xlstm_lm.base.run_layout import CHECKPOINTS, CONFIG, LATEST, has_metrics, has_trained, run_of_checkpoint
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.status import read_status

FREE_TO_CHANGE = (
    "training.steps",
    "training.run_dir",
    "training.resume",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_at",
    "training.keep_every",
    "training.max_hours",
    "training.validate_every",
    "training.gate_statistics_every",
    "training.micro_batch_size",
    "training.precision",
    "training.activation_checkpointing",
    "training.sequence_parallel",
    "safeguards.",
    "profile.",
    "wandb.",
    "deepspeed.",
    "data.num_workers",
    "data.prefetch_batches",
    # The checkpoint's data fingerprint tells whether these give other documents.
    *(
        f"data.{part}.{name}"
        for part in ("sources", "validation")
        for name in ("paths", "revision", "weight", "weight_by", "on_bad_document", "retry_seconds", "cache_gib")
    ),
    "model.chunk_length",
    "model.mixers.chunk_length",
)
"""Fields, or with a dot at the end sections, that may differ when a run goes on: they say how it is computed and
reported, not what is computed. A model's backends may always differ."""

FREE_WHEN_BRANCHING = (*FREE_TO_CHANGE, "optimizer.", "schedule.", "data.validation")
"""Fields that may differ when a run starts from another run's checkpoint."""

LENGTHS = ("schedule.warmup", "schedule.cooldown")
"""Fields in steps or, below 1, in shares of training.steps."""
_NUMBER = re.compile(r"\[[0-9]+\]")
_BACKEND = re.compile(r"model\..*_backend")

Complete = Callable[[dict[str, Any]], dict[str, Any]]
"""Gives the sections of an older configuration the defaults of the fields that they lack."""


def differing_fields(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """One line for each field of the two configurations that differs and is not in `free`.

    Lengths of the schedule are equal also where they stand for equally many steps, each in its own run.
    """
    old, new = _fields(with_current_names(before)), _fields(now)
    different = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not (name in LENGTHS and _steps(old, name) == _steps(new, name))
    ]
    return [
        f"  {name}: {old.get(name, 'not set')!r} there, {new.get(name, 'not set')!r} now"
        for name in different
        if not f"{_NUMBER.sub('', name)}.".startswith(free) and not _BACKEND.fullmatch(name)
    ]


def _steps(items: dict[str, Any], name: str) -> Any:
    length: Any = items.get(name)
    steps = items.get("training.steps")
    return in_steps(length, steps) if isinstance(steps, int) else length


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """`dotted_items`, with the fields of each mapping in a list as data.sources[0].kind and so on."""
    items: dict[str, Any] = {}
    for name, value in dotted_items(values).items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            for number, each in enumerate(value):
                items |= dotted_items(each, f"{name}[{number}].")
        else:
            items[name] = value
    return items


def check_same_run(
    folder: Path, config: dict[str, Any], complete: Complete, free: tuple[str, ...] = FREE_TO_CHANGE
) -> None:
    """Refuse to go on from `folder/config.yaml` (of a run or a checkpoint) with another configuration.

    An imported model has a file with the model's section alone, and nothing else is compared.

    Raises:
        ValueError: names each field that differs, with both values.
    """
    before = complete(RunFolder(folder).config())
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


def open_run_folder(run_dir: Path, config: dict[str, Any], complete: Complete, resume: str) -> None:
    """Check that the run in the folder, if there is one, is this one. For rank 0; changes nothing.

    A run that wrote nothing yet is no run, and an imported model, the checkpoint of step 0, is none yet.

    Raises:
        ValueError: the folder belongs to another configuration, or to any run where resume is never; or the run in it
            had checkpoints, which are gone.
    """
    folder = RunFolder(run_dir)
    checkpoints = folder.checkpoints()
    has_run = any(checkpoints) or has_metrics(run_dir)
    if has_run and resume == "never":
        raise ValueError(
            f"{run_dir} already holds a run, and training.resume is never: choose another training.run_dir, delete "
            "that folder, or continue it with --training.resume auto."
        )
    if has_run:
        check_same_run(run_dir, config, complete)
    elif checkpoints:
        check_same_run(checkpoints[0], config, complete)
    if has_run and not checkpoints and _had_checkpoints(folder):
        raise ValueError(
            f"{run_dir} holds a run whose checkpoints are gone. Put one back (a folder checkpoints/step_*) to go on "
            f"from it. To train again from the beginning, choose another training.run_dir, or move "
            f"{folder.metrics_path} away, which is the history of that run."
        )


def _had_checkpoints(folder: RunFolder) -> bool:
    """Whether the run in a folder without checkpoints once had one: it stopped or ended well, or trained past one.

    A run that was killed before its first checkpoint had none. Older runs have no status.json: their metrics tell.
    """
    if folder.curve_path.exists() or (folder.path / CHECKPOINTS / LATEST).exists():
        return True
    status = read_status(folder.path)
    if status is not None:  # it records each checkpoint once that is published, steps after the save began
        return any(each.get("to_step") != each.get("from_step") for each in status.attempts)
    every = folder.config()["training"]["checkpoint_every"]
    steps = [record["step"] for record in folder.metrics()]
    # A run that branched off another begins behind that one's checkpoints.
    return bool(steps) and (max(steps) - 1) // every * every >= min(steps)


def run_of_recipe(run_dir: str, origin: str) -> Path | None:
    """The run that a recipe belongs to as its config.yaml, where the recipe's `run_dir` is another folder.

    The config.yaml of a run that was moved or copied, or that is read from another current folder than the run was
    started in, stands for the run beside it, not for one that is, or would be made, at the path it names. One in a
    checkpoint stands for the checkpoint's run, or outside of a run for the checkpoint.

    Args:
        run_dir: the recipe's training.run_dir.
        origin: the recipe's path.

    Returns:
        the folder; None for a recipe that belongs to no run, or to the one at `run_dir`.
    """
    recipe, named = user_path(origin), user_path(run_dir)
    folder = recipe.absolute().parent
    in_checkpoint = contents(folder) == "a checkpoint"
    run_dir_above = run_of_checkpoint(folder)
    if in_checkpoint and run_dir_above and has_trained(run_dir_above):
        folder, in_checkpoint = run_dir_above, False
    if recipe.name != CONFIG or not (in_checkpoint or has_trained(folder)):
        return None
    return None if named.exists() and named.samefile(folder) else folder
