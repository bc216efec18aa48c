"""Check that an intact checkpoint belongs to the run that continues from it, before the run's folder is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xlstm_lm.base.errors import first_line
from xlstm_lm.base.read_files import NUMBER, Fields, read_json
from xlstm_lm.base.run_layout import RANDOM_STATE
from xlstm_lm.base.run_layout import STATE as STATE_FILE
from xlstm_lm.runs.checkpoint import misnamed
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.random_state import random_state_bytes, restore_random_state
from xlstm_lm.runs.same_run import differing_fields

FLOAT32 = "F32"
LABELS = {"model": "weights", "optimizer": "optimizer state"}
"""Names of the stems in messages."""
IMPORTED_STATE: Fields = {"step": int, "imported_from": str, "tokenizer_fingerprint": str}
STATE: Fields = {
    "step": int,
    "tokens": int,
    "optimizer_steps": int,
    "skipped_steps": int,
    "skipped_in_a_row": int,
    "elapsed_seconds": NUMBER,
    "data": dict,
    "data_fingerprint": dict,
    "processes": int,
}
SHOWN = 3
"""Tensors that a message names."""


@dataclass(frozen=True)
class Wanted:
    """Description of the run that a checkpoint must fit."""

    model: dict[str, Any]
    """The model section of its configuration."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each parameter."""
    optimizer: str
    """Kind of the optimizer."""
    moments: Mapping[str, tuple[int, ...]]
    """Shape of each tensor of optimizer state."""
    lanes: int
    """Rows of the global batch."""


def check_fit(checkpoint: Checkpoint, wanted: Wanted) -> None:
    """Refuse a checkpoint that does not belong to this run. Reads the headers of its tensor files, not the tensors.

    The check covers the step against the folder's name, config.yaml, the numbers of the state, the lanes of data, the
    random states, and name, type and shape of every tensor. An imported model has weights alone.

    Raises:
        ValueError: names the folder, all that does not fit, and what to do.
    """
    folder = checkpoint.folder
    fields = IMPORTED_STATE if checkpoint.is_imported else STATE
    take_away = f"Move {folder} away to continue from another checkpoint"
    read_json(folder / STATE_FILE, fields, f"{take_away}.")
    problems = [f"It {problem}"] if (problem := misnamed(checkpoint)) else []
    problems += _other_configuration(checkpoint, wanted)
    problems += _other_tensors(checkpoint, "model", wanted.shapes)
    if not checkpoint.is_imported:
        problems += _other_optimizer(checkpoint, wanted)
        problems += _other_state(checkpoint, wanted.lanes)
        problems += _damaged_random_states(checkpoint)
    if problems:
        raise ValueError(
            f"{folder} does not fit this run:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\n{take_away}, or choose another training.run_dir for a new run. Nothing has been changed."
        )


def _other_configuration(checkpoint: Checkpoint, wanted: Wanted) -> list[str]:
    """Describe the fields of the checkpoint's model section that differ and change the computation."""
    there = checkpoint.config()["model"]
    now = {name: value for name, value in wanted.model.items() if name in there}  # it lacks fields that are newer
    return [f"config.yaml: {line.strip()}" for line in differing_fields({"model": there}, {"model": now})]


def _other_optimizer(checkpoint: Checkpoint, wanted: Wanted) -> list[str]:
    if checkpoint.optimizer == wanted.optimizer:
        return _other_tensors(checkpoint, "optimizer", wanted.moments)
    kinds = f"{checkpoint.optimizer!r} there, {wanted.optimizer!r} now"
    return [f"state.json: optimizer.kind {kinds}: one optimizer cannot go on from another's state"]


def _other_tensors(checkpoint: Checkpoint, stem: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    forms = checkpoint.forms(stem)
    wanted = {name: (FLOAT32, tuple(shape)) for name, shape in shapes.items()}
    different = [name for name in [*wanted, *sorted(forms.keys() - wanted)] if forms.get(name) != wanted.get(name)]
    lines = [f"{name}: {_form(forms.get(name))} there, {_form(wanted.get(name))} now" for name in different[:SHOWN]]
    more = [f"{len(different) - SHOWN} more tensors"] if len(different) > SHOWN else []
    return [f"{LABELS[stem]}: {line}" for line in lines + more]


def _form(form: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if form is None else f"{form[0]} {form[1]}"


def _other_state(checkpoint: Checkpoint, lanes: int) -> list[str]:
    state = checkpoint.state
    counts = [name for name, types in STATE.items() if types is not dict]
    problems = [f"state.json: {name} is {state[name]}" for name in counts if not state[name] >= 0]
    different = sorted(state["data"].keys() ^ {str(lane) for lane in range(lanes)})
    if different:
        sizes = f"data of {len(state['data'])} lanes there, {lanes} now"
        problems.append(f"state.json: {sizes}; lane {different[0]} is in one of them only")
    return problems


def _damaged_random_states(checkpoint: Checkpoint) -> list[str]:
    """Describe the files of random states that are missing or cannot be restored, by restoring each."""
    problems = []
    before = random_state_bytes()
    for rank in range(checkpoint.state["processes"]):
        content = checkpoint.random_state(rank)
        name = RANDOM_STATE.format(rank)
        if content is None:
            problems.append(f"{name}: absent, of {checkpoint.state['processes']} processes by state.json")
            break
        try:
            restore_random_state(content)
        except Exception as error:  # whatever torch makes of bytes
            reason = first_line(error).split(". ")[0]
            problems.append(f"{name}: it cannot be read ({reason})")
    restore_random_state(before)
    return problems
