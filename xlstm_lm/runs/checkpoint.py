"""Checkpoints by parameter name: independent of ZeRO stage and number of processes, and whole or not there at all.

checkpoints/latest                     the name of the newest
checkpoints/step_00000100/
    model.safetensors                  float32 weights
    optimizer.safetensors              the optimizer's state, NAME.KEY, such as NAME.exp_avg of AdamW
    state.json                         step, tokens, data state of every lane, counters
    random_rank0000.pt                 states of all random number generators, one file a process
    config.yaml, tokenizer/            what it takes to use the model
    manifest.json                      size and CRC-32 of all the files above, written last

`xlstm-lm import` writes one of step 0 with weights, tokenizer and the model's section of config.yaml alone: a run that
starts there has moments, data and counters of its own.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from xlstm_lm.base.durable_files import (
    RunError,
    crc32_of,
    disk_errors_explained,
    replace_durably,
    sync_folder,
    write_durably,
)
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import (
    CHECKPOINTS,
    CONFIG,
    LATEST,
    MANIFEST,
    STATE,
    TOKENIZER,
    checkpoint_folder,
    checkpoint_folders,
    step_in_name,
)
from xlstm_lm.base.tensor_files import TensorWriter, read_tensors, tensor_files
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.random_state import random_state_bytes

logger = logging.getLogger("xlstm_lm")

FORMAT = 1
"""Version that is written. A new one keeps the reader of the old one in `READERS`."""
RANDOM_STATE = "random_rank{:04}.pt"
LEFTOVER = ".tmp-"
WRITTEN_ALWAYS = (STATE, CONFIG)
TAKE_AWAY = "Restore {folder} from a copy, or move it away to continue from the checkpoint before it."


class Checkpoint:
    """An intact checkpoint on disk, in format 1; `read_checkpoint` makes it.

    The reader of another format derives from this class and gives the same names, tensors and state as of today.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: state.json is damaged.
        """
        self.folder = folder
        self.state = read_json(folder / STATE, {"step": int}, TAKE_AWAY.format(folder=folder))

    @property
    def is_imported(self) -> bool:
        """True for an imported model: weights alone, and nothing of a run."""
        return "imported_from" in self.state

    @property
    def optimizer(self) -> str:
        """Kind of the optimizer whose state it holds. Older checkpoints do not name theirs, AdamW."""
        return self.state.get("optimizer", "adamw")

    def config(self) -> dict[str, Any]:
        """Sections of its config.yaml; an imported model's has the model's section alone."""
        return RunFolder(self.folder).config()

    def all_weights(self) -> dict[str, Tensor]:
        """Every float32 weight by name. They stay in their files until they are used."""
        files = tensor_files(self.folder)
        return dict(read_tensors(files, files))

    def weights(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 weight of each named parameter, in order.

        Raises:
            ValueError: the checkpoint holds other parameters.
        """
        return self._read("model", names)

    def moments(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each named tensor of the optimizer's state, in order; raises as `weights` does."""
        return self._read("optimizer", names)

    def random_state(self, rank: int) -> bytes | None:
        """The random states of a rank; None where the run had fewer ranks."""
        path = self.folder / RANDOM_STATE.format(rank)
        return path.read_bytes() if path.is_file() else None

    def _read(self, stem: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        files = tensor_files(self.folder, stem)
        different = sorted(set(names) ^ set(files))
        if different:
            raise ValueError(
                f"{self.folder} belongs to another model: {len(different)} tensors are in one of the two only, such as "
                f"{different[0]}."
            )
        return read_tensors(files, names)


READERS: dict[int, type[Checkpoint]] = {1: Checkpoint}
"""The reader of each format."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint that `newest_checkpoint` or `find_checkpoint` has found intact, whatever its format.

    Raises:
        ValueError: its state.json is damaged, or its format unknown.
    """
    return READERS[_format_of(folder)](folder)


def data_fingerprint(folder: Path) -> dict[str, Any]:
    """Fingerprint of the data in a checkpoint, from its state.json alone.

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


def damage(folder: Path) -> str:
    """Describe the damage of a checkpoint, naming the file; empty if it is intact."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        return f"{folder} is not a checkpoint: it has no manifest.json."
    try:
        _format_of(folder)
        manifest = read_json(manifest_path, {"step": int, "files": dict}, "")
    except ValueError as error:
        return str(error).strip()
    files = manifest["files"]
    unnamed = [name for name in WRITTEN_ALWAYS if name not in files]
    if unnamed:
        return f"{manifest_path} is damaged: it does not name {unnamed[0]}."
    for name, recorded in files.items():
        path = folder / name
        if not isinstance(recorded, dict) or not {"size", "crc32"} <= recorded.keys():
            return f"{manifest_path} is damaged: it gives no size and checksum of {name}."
        if not path.is_file():
            return f"{path} is missing from its checkpoint."
        if path.stat().st_size != recorded["size"]:
            return f"{path} is damaged: it has {path.stat().st_size} bytes instead of {recorded['size']}."
        if crc32_of(path) != recorded["crc32"]:
            return f"{path} is damaged: its checksum differs from the one in manifest.json."
    try:
        step = read_json(folder / STATE, {"step": int}, "")["step"]
    except ValueError as error:
        return str(error).strip()
    if step != manifest["step"]:
        return f"{folder} is damaged: state.json is of step {step}, manifest.json of step {manifest['step']}."
    return ""


def looks_like_a_checkpoint(path: Path) -> bool:
    """Whether a path is a run's folder with checkpoints or a checkpoint's, by file names alone."""
    return (path / CHECKPOINTS).is_dir() or (path / MANIFEST).is_file()


def misnamed(checkpoint: Checkpoint) -> str:
    """Problem of a checkpoint stored under the number of another step; empty if the numbers agree."""
    step = checkpoint.state["step"]
    if step_in_name(checkpoint.folder) in (None, step):
        return ""
    return f"holds the checkpoint of step {step}, by its state.json: it was copied or renamed"


def newest_checkpoint(run_dir: Path) -> Path:
    """The folder of a run's newest intact checkpoint. Damaged ones are named in a warning and passed over.

    Raises:
        ValueError: there is none.
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
    """The intact checkpoint that `path` is, or the newest of the run that it is.

    Raises:
        ValueError: it is neither, or damaged, or a folder of the run with the number of another step.
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


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed writer left behind."""
    parent = run_dir / CHECKPOINTS
    for path in parent.glob(f"{LEFTOVER}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_checkpoint(
    run_dir: Path,
    *,
    world: World,
    state: dict[str, Any],
    sizes: dict[str, int],
    weights: Iterator[tuple[str, Tensor]],
    moment_sizes: dict[str, int] | None = None,
    moments: Iterator[tuple[str, Tensor]] | None = None,
    config_yaml: str,
    save_tokenizer: Callable[[Path], None],
    keep: int,
) -> Path:
    """Save the run at `state["step"]`, then delete all but the newest `keep` checkpoints up to it. Collective.

    `sizes` and `moment_sizes` give the number of elements of each tensor, in the order that `weights` and `moments`
    yield them; the moments are None for an imported model. Only rank 0 writes. Returns the checkpoint's folder.

    Raises:
        RunError: on every rank, where rank 0 could not write; the unfinished folder is gone.
    """
    random_states = world.gather(random_state_bytes()) if moments is not None else []
    writer = _Writer(run_dir, state["step"], config_yaml, save_tokenizer) if world.is_first else None
    message = writer.attempt(writer.begin) if writer else None
    parts = [("model", sizes, weights)]
    if moments is not None:
        assert moment_sizes is not None
        parts.append(("optimizer", moment_sizes, moments))
    for stem, stem_sizes, tensors in parts:
        if writer and not message:
            message = writer.attempt(writer.open, stem, stem_sizes)
        for name, tensor in tensors:  # collective: continues even if writing has failed
            if writer and not message:
                message = writer.attempt(writer.tensors.add, name, tensor)
    if writer and not message:
        message = writer.attempt(writer.finish, state, random_states, keep)
    message = world.from_first(message)
    if message:
        raise RunError(message)
    return checkpoint_folder(run_dir, state["step"])


class _Writer:
    """Rank 0's part of writing one checkpoint."""

    def __init__(self, run_dir: Path, step: int, config_yaml: str, save_tokenizer: Callable[[Path], None]) -> None:
        self.target = checkpoint_folder(run_dir, step)
        self.parent = self.target.parent
        self.folder = self.parent / f"{LEFTOVER}{self.target.name}"
        self.step, self.config_yaml, self.save_tokenizer = step, config_yaml, save_tokenizer
        self.files: dict[str, dict[str, int]] = {}
        self.tensors: TensorWriter

    def attempt(self, action: Callable[..., None], *arguments: Any) -> str | None:
        """Call the action. If the disk fails, remove the unfinished folder and return the message for the user."""
        try:
            with disk_errors_explained(self.target):
                action(*arguments)
        except RunError as stopped:
            shutil.rmtree(self.folder, ignore_errors=True)
            return str(stopped)
        return None

    def begin(self) -> None:
        self.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def open(self, stem: str, sizes: dict[str, int]) -> None:
        self.tensors = TensorWriter(stem, sizes, self.write)

    def write(self, name: str, content: bytes) -> None:
        size, crc32 = write_durably(self.folder / name, content)
        self.files[name] = {"size": size, "crc32": crc32}

    def finish(self, state: dict[str, Any], random_states: list[bytes], keep: int) -> None:
        for rank, content in enumerate(random_states):
            self.write(RANDOM_STATE.format(rank), content)
        self.write(STATE, json.dumps(state).encode())
        self.write(CONFIG, self.config_yaml.encode())
        tokenizer = self.folder / TOKENIZER
        self.save_tokenizer(tokenizer)
        for path in sorted(tokenizer.rglob("*")):
            if path.is_file():
                self.write(path.relative_to(self.folder).as_posix(), path.read_bytes())
        sync_folder(tokenizer)
        manifest = {"format": FORMAT, "step": self.step, "files": self.files}
        write_durably(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(self.folder)
        if self.target.exists():  # a damaged one, or one of a run whose newer steps were given up
            replaced = self.parent / f"{LEFTOVER}replaced-{self.target.name}"
            self.target.rename(replaced)
            self.folder.rename(self.target)
            shutil.rmtree(replaced)
        else:
            self.folder.rename(self.target)
        sync_folder(self.parent)
        replace_durably(self.parent / LATEST, f"{self.target.name}\n".encode())
        older = [folder for step, folder in checkpoint_folders(self.parent.parent).items() if step <= self.step]
        for folder in older[keep:]:
            # Renamed first, so that a half-deleted one is never taken for a damaged checkpoint.
            doomed = self.parent / f"{LEFTOVER}old-{folder.name}"
            folder.rename(doomed)
            shutil.rmtree(doomed)
