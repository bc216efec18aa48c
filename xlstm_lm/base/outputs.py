"""Rules for output places, checked by every command before it writes: never over or into existing results.

A folder is known by what is in it, not by its name:

* a checkpoint by its manifest.json and state.json, or by lying in a run's `checkpoints`;
* a run by its checkpoints, a metrics.jsonl with lines, or a config.yaml that a run has written;
* a model (an export, a folder of transformers) by config.json beside weights;
* a tokenizer by tokenizer.json beside tokenizer_config.json.

Nothing may be written inside a checkpoint, a model or a tokenizer, at whatever depth: checkpoints are deleted when they
are old, and folders on the hub are sent whole. Inside a run new names are free, those that the run itself writes are
not.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xlstm_lm.base.durable_files import sync_folder
from xlstm_lm.base.lease import LEASE_FILE, FolderLease
from xlstm_lm.base.run_layout import (
    CHECKPOINTS,
    CONFIG,
    LOGS,
    MANIFEST,
    RUN_NAMES,
    STATE,
    WANDB,
    checkpoint_folders,
    holds_run,
    is_in_a_checkpoints_place,
)

STRAY_FILES = (
    "*.out",
    "*.err",
    "*.log",
    "*.md",
    "*.sh",
    "*.sbatch",
    "*.slurm",
    "*.yaml",
    "*.yml",
    "*log*.txt",
    "*note*.txt",
    "readme*",
    ".*",
    LEASE_FILE,
)
"""Files that may lie in a folder before a run begins in it: a scheduler's logs, notes, scripts, hidden files."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def contents(folder: Path) -> str:
    """Name what a folder holds, such as "a checkpoint"; empty where it is none of what this module knows."""
    there = {name for name in _TELLING if (folder / name).exists()}
    if {MANIFEST, STATE} <= there or (is_in_a_checkpoints_place(folder) and there & {STATE, *WEIGHTS}):
        return "a checkpoint"
    if checkpoint_folders(folder):
        return "a run"
    if folder.name in (CHECKPOINTS, WANDB) and holds_run(folder.parent):
        return f"the {folder.name} folder of a run"
    if "config.json" in there and there & set(WEIGHTS):
        return "a model"
    if {"tokenizer.json", "tokenizer_config.json"} <= there:
        return "a tokenizer"
    return "a run" if holds_run(folder) else ""


_TELLING = (MANIFEST, STATE, "config.json", "tokenizer.json", "tokenizer_config.json", *WEIGHTS)


def check_new_folder(out: Path) -> None:
    """Refuse a place that is not free for a new folder; for before the long work.

    Raises:
        ValueError: something is there that is no empty folder, or it lies inside of what must not be added to.
    """
    _refuse_inside(out)
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a symbolic link to {out.readlink()}, which is not there; choose another folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another folder.")
    if out.exists() and any(out.iterdir()):
        what = contents(out.resolve())
        raise ValueError(f"{out} exists and is not empty{what and f': it holds {what}'}; choose another folder.")
    if out.exists() and out.samefile(Path.cwd()):
        raise ValueError(f"{out} is the current folder, which a new one cannot replace; choose another folder.")


def check_run_folder(run_dir: Path) -> None:
    """Refuse a folder that neither is a run's nor can become one.

    It may be absent, empty, or hold a run. It may also hold what people and schedulers put there before a run begins:
    files that match `STRAY_FILES`, and the folder `logs` of the launch scripts. A config.yaml that no run has written
    is somebody's own and would be replaced, so it is refused as everything else is.

    Raises:
        ValueError: names what is there.
    """
    choose = "choose another training.run_dir."
    _refuse_impossible(run_dir, choose)
    what = contents(run_dir.resolve())
    if what == "a checkpoint":
        raise ValueError(
            f"training.run_dir {run_dir} is a checkpoint, which a run in it would destroy. Give its run's folder to go "
            f"on from the newest one there, or a new folder and --training.resume {run_dir} to start from it."
        )
    _refuse_inside(run_dir, choose)
    if run_dir.is_symlink() and not run_dir.exists():
        raise ValueError(f"training.run_dir {run_dir} is a symbolic link to {run_dir.readlink()}, which is not there.")
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise ValueError(f"training.run_dir {run_dir} is a file; choose a folder.")
    if what == "a run":
        return
    if what:
        raise ValueError(f"training.run_dir {run_dir} is {what}; {choose}")
    config = run_dir / CONFIG
    if config.is_file():
        raise ValueError(
            f"training.run_dir {run_dir} holds a config.yaml that no run has written, and a run's own would replace "
            f"it: give it another name, or {choose}"
        )
    for path in sorted(run_dir.iterdir()):
        stray = any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in STRAY_FILES)
        if (path.is_dir() or not stray) and path.name not in (LOGS, "lost+found"):  # which every new disk has
            raise ValueError(f"training.run_dir {run_dir} is no run's folder and is not empty ({path.name}); {choose}")


def check_output_file(out: Path) -> None:
    """Refuse a place for results in JSON, and for a picture beside them, where something else is.

    Results of an earlier time, known by their key "environment", are replaced.

    Raises:
        ValueError: it is a folder or another file, or lies inside of what must not be added to.
    """
    choose = "choose another file."
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it.")
    _refuse_inside(out, choose)
    if out.exists() and not _is_of_results(out):
        raise ValueError(f"{out} exists and holds no earlier results; {choose}")
    picture = out.with_suffix(".png")
    if picture.exists() and not out.exists():
        raise ValueError(f"{out}: its picture would replace {picture}; {choose}")


def check_folder_of_runs(folder: Path) -> None:
    """Refuse a folder for the runs of a study that itself is, or lies in, something else.

    Raises:
        ValueError: names what it is.
    """
    _refuse_inside(folder)
    what = contents(folder.resolve())
    if what:
        raise ValueError(f"{folder} is {what}, no folder for several runs; choose another folder.")


def _refuse_impossible(out: Path, choose: str) -> None:
    """Refuse a place that cannot be: its name is too long, a part of its path is a file, or writing is forbidden."""
    try:
        out.stat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise ValueError(f"{out}: a part of this path is a file, not a folder; {choose}") from None
    except OSError as error:
        raise ValueError(f"{out} is no place to write to ({error.strerror}); {choose}") from None
    folder = next(each for each in (out, *out.absolute().parents) if each.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{out} is no place to write to (no permission to write in {folder}); {choose}")


def _refuse_inside(out: Path, choose: str = "choose another folder.") -> None:
    """Refuse a place inside of a checkpoint, a model or a tokenizer, or under a name that a run there writes itself."""
    _refuse_impossible(out, choose)
    place = out.resolve()  # a symbolic link counts as what it points to
    for above in place.parents:
        what = contents(above)
        if what and what != "a run":
            raise ValueError(f"{out} lies in {above}, which is {what}; {choose}")
    if place.name in RUN_NAMES and holds_run(place.parent):
        raise ValueError(f"{out}: the run in {place.parent} keeps its own {place.name} there; {choose}")


def _is_of_results(out: Path) -> bool:
    try:
        return "environment" in json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@contextmanager
def whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which becomes `out` at the end, or goes away with an error.

    Raises:
        ValueError: another process is writing to `out`, or it is no longer free at the end.
    """
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    with FolderLease.take(partial):
        for path in partial.iterdir():  # of one that was killed
            if path.name != LEASE_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            check_new_folder(out)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync_folder(out.parent)
