"""Saving in the background: each rank copies its share to the host and writes it, and rank 0 publishes the whole.

A save passes through two phases, each in a thread of every rank that has work:

1. write: each rank copies its share, then writes its files to checkpoints/.tmp-step_*, through to the disk. Weights and
   optimizer state must not change before the copy is complete (`finish_copy`). It goes on beside the forward and
   backward pass of the next step, which change neither. A copy from a GPU is made before the thread starts.
2. publish: once all ranks have, rank 0 writes the rest and the manifest, renames the folder, moves `latest`, and
   deletes old checkpoints.

Threads never communicate. The main threads go from phase to phase together, in `advance` after a step in which all
ranks counted as ready, or in `wait`. A process that dies in any phase leaves only a folder .tmp-*.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlstm_lm.base.durable_files import (
    RunError,
    disk_errors_explained,
    replace_durably,
    sync_folder,
    write_durably,
)
from xlstm_lm.base.run_layout import (
    CHECKPOINTS,
    CONFIG,
    LATEST,
    MANIFEST,
    RANDOM_STATE,
    STATE,
    TOKENIZER,
    checkpoint_folder,
    checkpoint_folders,
)
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_layout import FILE, HostBuffers, Piece, Share, stored_tensors, write_shares
from xlstm_lm.runs.random_state import random_state_bytes

logger = logging.getLogger("xlstm_lm")

FORMAT = 2
"""Version that is written."""
LEFTOVER = ".tmp-"
Files = dict[str, dict[str, int]]
"""Size and CRC-32 of each file, by its name in the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Content of a checkpoint on this rank."""

    state: dict[str, Any]
    """Content of state.json; `step` names the checkpoint."""
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Shapes of all tensors, by stem (model, optimizer) and name; an imported model has no optimizer."""
    shares: Mapping[str, Iterable[Share]]
    """This rank's shares, by stem; those of all ranks hold each element once."""
    config_yaml: str
    """Content of config.yaml."""
    save_tokenizer: Callable[[Path], None]
    """Writes the tokenizer's files to a folder."""
    keep: int
    """Number of newest checkpoints up to this one that are kept."""
    keep_at: Callable[[int], bool] = field(default=lambda step: False)
    """Whether the checkpoint of a step is kept for ever."""


class CheckpointWriter:
    """Writer of a run's checkpoints on this rank. One save at a time is on its way."""

    def __init__(
        self,
        world: World,
        place: Callable[[], Path],
        on_published: Callable[[int, float], None] = lambda step, seconds: None,
    ) -> None:
        """Write nothing yet.

        Args:
            world: All processes of the run.
            place: Current folder of the run; on rank 0 it raises RunError if this process has lost the lease on it.
            on_published: Called on each rank with the step of a published checkpoint, and the seconds since its save
                began.
        """
        self._world, self._place, self._on_published = world, place, on_published
        self._buffers = HostBuffers()
        self._pending: _Save | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()

    @property
    def is_ready(self) -> bool:
        """Whether this rank's thread has no work left in the current phase of the save on its way."""
        return self._pending is None or not self._pending.is_working

    def prepare(self, shares: Mapping[str, Iterable[Share]]) -> None:
        """Allocate the host buffers of shares, by stem: the first save then blocks no longer than later ones."""
        for stem, own in shares.items():
            self._buffers.copy(stem, own)  # a page of memory is allocated when it is first written

    def save(self, snapshot: Snapshot) -> None:
        """Begin to copy this rank's share to the host and to write it. Waits for the save before. Collective.

        The share must not change until `finish_copy` has returned.

        Raises:
            RunError: this save, or the one before, cannot be written; raised on every rank.
        """
        self.wait()
        with_random_states = "optimizer" in snapshot.shapes
        save = _Save(self._world, snapshot, self._place)
        message = self._world.from_first(save.attempt(save.begin) if self._world.is_first else None)
        if message:
            raise RunError(message)
        originals = {stem: list(own) for stem, own in snapshot.shares.items()}
        random_state = random_state_bytes() if with_random_states else None
        shares: dict[str, list[Share]] = {}

        def copy() -> None:
            try:
                shares.update({stem: self._buffers.copy(stem, own) for stem, own in originals.items()})
            finally:
                self._is_copied.set()

        self._is_copied.clear()
        self._pending = save
        is_on_gpu = any(share.values_N.is_cuda for own in originals.values() for share in own)
        if is_on_gpu:
            copy()
        save.start(lambda: save.write(shares, random_state), before=None if is_on_gpu else copy)

    def finish_copy(self) -> None:
        """Wait until this rank's share of the save on its way is copied: it may change from then on."""
        self._is_copied.wait()

    def advance(self, ready_ranks: int) -> None:
        """Go on with the save on its way if all ranks are ready. Collective, at each step.

        Args:
            ready_ranks: Number of ranks that were ready in this step, the same on all ranks.

        Raises:
            RunError: it cannot be written; raised on every rank.
        """
        if self._pending and ready_ranks == self._world.size:
            self._next_phase()

    def wait(self) -> None:
        """Wait until the save on its way is published. Collective.

        Raises:
            RunError: it cannot be written; raised on every rank.
        """
        while self._pending:
            self._pending.join()
            self._next_phase()

    def close(self) -> None:
        """Finish the save on its way at an end by an error, if that needs no other process; otherwise give it up."""
        if self._world.size == 1:
            try:
                self.wait()
            except RunError as error:
                logger.warning("%s", error)

    def _next_phase(self) -> None:
        save = self._pending
        assert save is not None
        save.join()
        results = self._world.gather((save.message, save.files, save.pieces))
        message = next((each for each, _, _ in results if each), None)
        if message and self._world.is_first:
            save.discard()
        message = self._world.from_first(message)
        if message or save.is_publishing:
            self._pending = None
        if message:
            raise RunError(message)
        if save.is_publishing:
            self._on_published(save.snapshot.state["step"], time.monotonic() - save.began)
            return
        save.is_publishing = True
        if self._world.is_first:
            save.start(lambda: save.publish([(files, pieces) for _, files, pieces in results]))


class _Save:
    """One checkpoint on its way, on this rank."""

    def __init__(self, world: World, snapshot: Snapshot, place: Callable[[], Path]) -> None:
        self.world, self.snapshot, self.place = world, snapshot, place
        self.run_dir, self.began = place(), time.monotonic()
        self.message: str | None = None
        """Reason why it cannot be written."""
        self.files: Files = {}
        self.pieces: dict[str, dict[str, Piece]] = {}
        self.is_publishing = False
        self._thread: threading.Thread | None = None

    @property
    def target(self) -> Path:
        return checkpoint_folder(self.run_dir, self.snapshot.state["step"])

    @property
    def folder(self) -> Path:
        return self.target.with_name(f"{LEFTOVER}{self.target.name}")

    @property
    def is_working(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], None], before: Callable[[], None] | None = None) -> None:
        """Call the action in a thread. `before` is called first and never again, even if the action is."""

        def work() -> None:
            self.message = (self.attempt(before) if before else None) or self.attempt(action)

        self._thread = threading.Thread(target=work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread:
            self._thread.join()

    def attempt(self, action: Callable[[], None]) -> str | None:
        """Call the action. If it fails, return the message for the user.

        The action is called once more if the run's folder was moved meanwhile.
        """
        try:
            while True:
                self.run_dir = before = self.place()
                try:
                    with disk_errors_explained(self.target):
                        action()
                    return None
                except RunError:
                    if self.place() == before:
                        raise
        except RunError as stopped:
            return str(stopped)
        except Exception as error:  # of a thread: it must reach the main one
            return f"{self.target} cannot be written: {type(error).__name__}: {error}"

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def write(self, shares: dict[str, list[Share]], random_state: bytes | None) -> None:
        """Write this rank's files."""
        for stem, own in shares.items():
            name = FILE.format(stem, self.world.rank)
            self.files[name] = write_shares(self.folder / name, own)
            self.pieces[stem] = {share.name: Piece(name, share.start, share.values_N.numel()) for share in own}
        if random_state is not None:
            self._write(RANDOM_STATE.format(self.world.rank), random_state)
        sync_folder(self.folder)

    def _write(self, name: str, content: bytes) -> None:
        size, crc32 = write_durably(self.folder / name, content)
        self.files[name] = {"size": size, "crc32": crc32}

    def publish(self, results: list[tuple[Files, dict[str, dict[str, Piece]]]]) -> None:
        """Write the rest of the checkpoint and give it its name. For rank 0."""
        if self.folder.exists():  # otherwise it has its name already: the run's folder was moved after the renaming
            self._complete(results)
            self.place()  # a holder that has lost its lease publishes nothing
            self._rename()
        replace_durably(self.target.parent / LATEST, f"{self.target.name}\n".encode())
        self._delete_old()

    def _complete(self, results: list[tuple[Files, dict[str, dict[str, Piece]]]]) -> None:
        snapshot = self.snapshot
        for files, _ in results:
            self.files |= files
        self._write(STATE, json.dumps(snapshot.state).encode())
        self._write(CONFIG, snapshot.config_yaml.encode())
        tokenizer = self.folder / TOKENIZER
        snapshot.save_tokenizer(tokenizer)
        for path in sorted(tokenizer.rglob("*")):
            if path.is_file():
                self._write(path.relative_to(self.folder).as_posix(), path.read_bytes())
        sync_folder(tokenizer)
        tensors = {
            stem: {
                name: tensor.as_json()
                for name, tensor in stored_tensors(shapes, [pieces[stem] for _, pieces in results]).items()
            }
            for stem, shapes in snapshot.shapes.items()
        }
        manifest = {"format": FORMAT, "step": snapshot.state["step"], "files": self.files, "tensors": tensors}
        write_durably(self.folder / MANIFEST, json.dumps(manifest).encode())
        sync_folder(self.folder)

    def _rename(self) -> None:
        if self.target.exists():  # damaged, or of a run that was continued from an older step
            replaced = self.target.with_name(f"{LEFTOVER}replaced-{self.target.name}")
            self.target.rename(replaced)
            self.folder.rename(self.target)
            shutil.rmtree(replaced)
        else:
            self.folder.rename(self.target)
        sync_folder(self.target.parent)

    def _delete_old(self) -> None:
        now = self.snapshot.state["step"]
        older = [(step, folder) for step, folder in checkpoint_folders(self.run_dir).items() if step <= now]
        for step, folder in older[self.snapshot.keep :]:
            if self.snapshot.keep_at(step):
                continue
            _remove(folder)


def write_checkpoint(run_dir: Path, world: World, snapshot: Snapshot) -> Path:
    """Save a checkpoint and wait until it is published. Collective. Returns its folder.

    Raises:
        RunError: it cannot be written; raised on every rank, and the unfinished folder has been removed.
    """
    writer = CheckpointWriter(world, lambda: run_dir)
    writer.save(snapshot)
    writer.wait()
    return checkpoint_folder(run_dir, snapshot.state["step"])


def remove_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which the run makes again."""
    for later, folder in checkpoint_folders(run_dir).items():
        if later > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first: a half-deleted one is never taken for a damaged checkpoint.
    doomed = folder.with_name(f"{LEFTOVER}old-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run_dir: Path) -> None:
    """Delete the unfinished files of a killed writer."""
    for path in (run_dir / CHECKPOINTS).glob(f"{LEFTOVER}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
