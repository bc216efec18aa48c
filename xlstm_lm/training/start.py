"""The start of a run: its folder, the checkpoint to continue from, and restoring data, weights and random states."""

from __future__ import annotations

import contextlib
import logging
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from xlstm_lm.base import console
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.finite import listed
from xlstm_lm.base.lease import FolderLease
from xlstm_lm.base.outputs import check_run_folder
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.run_layout import has_trained
from xlstm_lm.data import Tokenizer
from xlstm_lm.data.opened import Commit
from xlstm_lm.data.training_data import Stream, TrainingData
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.attempt import Attempt
from xlstm_lm.runs.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.checkpoint_writer import remove_leftovers
from xlstm_lm.runs.fit import Wanted, check_fit
from xlstm_lm.runs.folder import MetricsSplit, RunFolder
from xlstm_lm.runs.heartbeats import remove_all_heartbeats
from xlstm_lm.runs.same_run import FREE_WHEN_BRANCHING, check_same_run, open_run_folder
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.memory import planned_shapes
from xlstm_lm.training.restore import continue_random_state, load_engine
from xlstm_lm.training.run_config import RunConfig, as_dict, as_recipe, with_defaults
from xlstm_lm.training.safeguards import NOT_FINITE

logger = logging.getLogger("xlstm_lm")

FRESH_STATE = {"step": 0, "tokens": 0, "elapsed_seconds": 0.0, "skipped_steps": 0, "skipped_in_a_row": 0}


class Start:
    """The folder of a run and the checkpoint that the run starts from, on this rank."""

    def __init__(self, run: RunConfig, world: World, resources: contextlib.ExitStack) -> None:
        """Lock the run's folder against other runs until `resources` are closed. Collective."""
        self.run, self.world, self.run_dir = run, world, run.training.folder
        self.config, self.config_yaml = as_dict(run), as_recipe(run)
        self.checkpoint: Checkpoint | None = None
        """The checkpoint, once the folder is open; None for a fresh start."""
        self.lease: FolderLease | None = None
        """Rank 0's lease on the folder; None on other ranks."""
        self.metrics: MetricsSplit | None = None
        """Rank 0's metrics of earlier sessions, once the folder is open; None on other ranks."""
        number = world.on_first(lambda: self._take_folder(resources))
        if not world.is_first:
            self.attempt = Attempt(lambda: self.run_dir, run.training.steps, number)
        resources.enter_context(self.attempt)

    def _take_folder(self, resources: contextlib.ExitStack) -> int:
        """Lock the folder and return the number of this attempt. For rank 0."""
        check_run_folder(self.run_dir)
        self.lease = FolderLease.take(self.run_dir)
        resources.callback(self.lease.release)
        remove_all_heartbeats(self.run_dir)
        self.attempt = Attempt(self.lease.place, self.run.training.steps)
        return self.attempt.number

    def open_folder(self) -> None:
        """Check the run's folder, write config.yaml, and open the checkpoint to start from. Collective.

        Raises:
            ValueError: the folder or the checkpoint belongs to another run, or is damaged.
        """
        folder = self.world.on_first(self._open_folder)
        self.checkpoint = read_checkpoint(folder) if folder else None

    def _open_folder(self) -> Path | None:
        """Prepare the run folder and return the checkpoint to start from, None for a fresh start. For rank 0."""
        resume, folder = self.run.training.resume, RunFolder(self.run_dir)
        complete = partial(with_defaults, self.run)
        branch = None
        if resume not in ("auto", "never") and not folder.checkpoints():
            branch = find_checkpoint(user_path(resume))
            check_same_run(branch, self.config, complete, FREE_WHEN_BRANCHING)
        open_run_folder(self.run_dir, self.config, complete, resume)
        start = newest_checkpoint(self.run_dir) if folder.checkpoints() else branch
        checkpoint = read_checkpoint(start) if start else None
        if checkpoint:
            self._check_checkpoint(checkpoint)
        self.metrics = folder.split(0 if checkpoint is None or checkpoint.is_imported else checkpoint.state["step"])
        if checkpoint and start != branch:
            folder.point_out_lost_metrics(self.metrics, start)
        folder.write_config(self.config_yaml)
        remove_leftovers(self.run_dir)
        self.attempt.start(0 if checkpoint is None or checkpoint.is_imported else checkpoint.state["step"])
        return start

    def _check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Check that the checkpoint fits the run, and that the run's id at Weights & Biases can be read.

        Raises:
            ValueError: names the folder or file and the fault.
        """
        shapes, moments = planned_shapes(self.run)
        kind, lanes = self.run.optimizer.kind, self.run.data.global_batch_size
        check_fit(checkpoint, Wanted(self.config["model"], shapes, kind, moments, lanes))
        if self.run.wandb.mode != "disabled" and self.run.wandb.id is None:
            RunFolder(self.run_dir).wandb_id()

    @property
    def state(self) -> dict[str, Any]:
        """Step and counters to continue from; zeros for a fresh start and for an imported model."""
        return self.checkpoint.state if self.checkpoint and not self.checkpoint.is_imported else FRESH_STATE

    @property
    def message(self) -> str:
        """Report of the start for the user; empty for a fresh start."""
        if not self.checkpoint:
            return ""
        if self.checkpoint.is_imported:
            return f"Starting from weights imported from {self.checkpoint.state['imported_from']}"
        return f"Continuing after step {self.state['step']}, from {self.checkpoint.folder}"

    def share_data(self, data: TrainingData) -> None:
        """Open the data on rank 0 for all ranks, at the commits of the hub that the run began with. Collective.

        Raises:
            ValueError: files that are missing or empty; a data set that is not there.
            ConnectionError: the hub does not answer.
        """
        folder = RunFolder(self.run_dir)
        known = self.world.on_first(lambda: folder.hub_commits() if has_trained(self.run_dir) else [])
        trained = self.checkpoint is not None and not self.checkpoint.is_imported
        saved = self.checkpoint.state["data_fingerprint"] if trained else None
        commits = data.share(self.world.on_first, saved, [Commit(*each) for each in known])
        self.world.on_first(lambda: folder.write_hub_commits(commits))

    def moved(self, run_dir: Path, step: int) -> RunError:
        """The error that ends a run whose folder was moved to `run_dir`, where a step is saved."""
        return RunError(
            f"The run's folder {self.run_dir} was moved to {run_dir} while the run was at work. Step {step} is saved "
            f"there; continue with --config {shlex.quote(str(RunFolder(run_dir).config_path))}"
        )

    def restore_data(self, stream: Stream, tokenizer: Tokenizer) -> None:
        """Set the data stream to the checkpoint's position; a run from an imported model starts at the beginning.

        Raises:
            ValueError: the checkpoint's data had another order, or the imported model has another tokenizer.
        """
        checkpoint = self.checkpoint
        if not checkpoint:
            return
        if checkpoint.is_imported:
            if checkpoint.state["tokenizer_fingerprint"] != tokenizer.fingerprint():
                raise ValueError(
                    f"The model imported from {checkpoint.state['imported_from']} was trained with another tokenizer "
                    "than data.tokenizer: give the recipe that the import wrote, model.yaml in its folder, as the last "
                    "--config."
                )
            return
        saved, lanes = checkpoint.state["data_fingerprint"], checkpoint.state["data"]
        different = self.world.on_first(lambda: stream.differences(saved, lanes))
        if different:
            raise ValueError(
                f"{checkpoint.folder} was trained on other data, or on the same in another order:\n"
                + "\n".join(different)
                + "\nPut the data back as it was, or choose another training.run_dir for a new run."
            )
        stream.load_state_dict(lanes, saved)

    def restore_engine(self, engine: TrainingEngine) -> None:
        """Load weights, optimizer state and random states of the checkpoint, whatever its number of processes.

        An imported model has weights alone. Collective.

        Raises:
            ValueError: the checkpoint belongs to another model.
        """
        checkpoint = self.checkpoint
        if not checkpoint:
            return
        console.stage(f"reading {checkpoint.folder}")
        broken = load_engine(checkpoint, engine, self.world)
        if broken and self.world.is_first:
            logger.warning(
                "%s holds numbers that are not finite, in %s. %s", checkpoint.folder, listed(broken), NOT_FINITE
            )
        if not checkpoint.is_imported:
            continue_random_state(checkpoint, self.world)
