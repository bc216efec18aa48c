"""Checkpoints by parameter name, independent of ZeRO stage and number of processes, written completely or not at all.

checkpoints/latest                     name of the newest
checkpoints/step_00000100/
    model_rank0000.safetensors         a rank's pieces of the float32 weights, flattened, by parameter name
    optimizer_rank0000.safetensors     and of the optimizer state, NAME.KEY, such as NAME.exp_avg of AdamW
    state.json                         step, tokens, data state of every lane, counters
    random_rank0000.pt                 states of all random number generators, one file a process
    config.yaml, tokenizer/            configuration and tokenizer, for use of the model
    manifest.json                      size and CRC-32 of all the files above, and of each tensor the shape and the
                                       pieces [file, first element, length] that hold it; written last

`xlstm-lm import` writes a checkpoint of step 0 that holds only weights, tokenizer and the model's section of
config.yaml. A run that starts there has optimizer state, data and counters of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import CHECKPOINTS, CONFIG, MANIFEST, STATE, checkpoint_folders, step_in_name
from xlstm_lm.runs.checkpoint_files import file_damage
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.checkpoint_format2 import ShardedCheckpoint, read_tensor_entries

logger = logging.getLogger("xlstm_lm")

WRITTEN_ALWAYS = (STATE, CONFIG)

READERS: dict[int, type[Checkpoint]] = {1: Checkpoint, 2: ShardedCheckpoint}
"""Reader of each format."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint that `newest_checkpoint` or `find_checkpoint` has found intact, whatever its format.

    Raises:
        ValueError: its state.json is damaged, or its format unknown.
    """
    return READERS[_format_of(folder)](folder)


def data_fingerprint(folder: Path) -> dict[str, Any]:
    """Read the fingerprint of a checkpoint's data, from state.json alone.

    Raises:
        ValueError: that file is missing or damaged.
    """
    return read_json(folder / STATE, {"data_fingerprint": dict})["data_fingerprint"]


def _format_of(folder: Path) -> int:
    form = read_json(folder / MANIFEST, {"format": int}, "")["format"]
    if form not in READERS:
        known = ", ".join(map(str, READERS))
        raise ValueError(f"{folder} has checkpoint format {form}, but this version of xlstm-lm reads format {known}.")
    return form


def damage(folder: Path, checksums: bool = True) -> str:
    """Describe the damage of a checkpoint, naming the file; empty if it is intact.

    Args:
        folder: Folder of the checkpoint.
        checksums: Whether contents are compared too, which reads all files; otherwise only sizes are.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        return f"{folder} is not a checkpoint: it has no manifest.json."
    try:
        _format_of(folder)
        manifest = read_json(manifest_path, {"step": int, "files": dict}, "")
    except ValueError as error:
        return str(error).strip()
    files = manifest["files"]
    if manifest["format"] > 1:
        try:
            read_tensor_entries(folder)
        except ValueError as error:
            return str(error).strip()
    unnamed = [name for name in WRITTEN_ALWAYS if name not in files]
    if unnamed:
        return f"{manifest_path} is damaged: it does not name {unnamed[0]}."
    problem = file_damage(folder, files, checksums)
    if problem:
        return problem
    try:
        step = read_json(folder / STATE, {"step": int}, "")["step"]
    except ValueError as error:
        return str(error).strip()
    if step != manifest["step"]:
        return f"{folder} is damaged: state.json is of step {step}, manifest.json of step {manifest['step']}."
    return ""


def looks_like_a_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a checkpoint or of a run with checkpoints, judged by file names alone."""
    return (path / CHECKPOINTS).is_dir() or (path / MANIFEST).is_file()


def misnamed(checkpoint: Checkpoint) -> str:
    """Problem of a checkpoint stored under the number of another step; empty if the numbers agree."""
    step = checkpoint.state["step"]
    if step_in_name(checkpoint.folder) in (None, step):
        return ""
    return f"holds the checkpoint of step {step}, by its state.json: it was copied or renamed"


def newest_checkpoint(run_dir: Path) -> Path:
    """Find a run's newest intact checkpoint. Damaged ones are named in a warning and passed over.

    Raises:
        ValueError: the run has no intact checkpoint.
    """
    folders = checkpoint_folders(Path(run_dir))
    if not folders:
        raise ValueError(f"{run_dir} has no checkpoint: there is no checkpoints/step_* in it.")
    problems = []
    for folder in folders.values():
        problem = damage(folder)
        if not problem:
            return folder
        problems.append(problem)
        logger.warning("%s The checkpoint before it is taken.", problem)
    raise ValueError(
        f"None of the {len(folders)} checkpoints in {Path(run_dir) / CHECKPOINTS} can be used:\n"
        + "\n".join(problems)
        + "\nRestore one from a copy, or choose another training.run_dir to start afresh."
    )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path` or, if `path` is a run, its newest intact one.

    Raises:
        ValueError: `path` is neither, or the checkpoint is damaged or stored under the number of another step.
    """
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path)
        problem = misnamed(read_checkpoint(newest))
        if problem:
            raise ValueError(f"{newest} {problem}. Rename it, or move it out of {newest.parent}.")
        return newest
    if not path.is_dir():
        raise ValueError(f"{path} is not a checkpoint: there is no such folder.")
    problem = damage(path)
    if problem:
        raise ValueError(f"{problem} Give a folder checkpoints/step_* of a run, or the run's folder.")
    return path
