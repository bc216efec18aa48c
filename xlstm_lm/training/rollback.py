"""Outliers in a row, and the way back to a checkpoint from before them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.errors import some_of
from xlstm_lm.base.finite import listed
from xlstm_lm.base.program import told_once
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.data import Batch
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint import damage, read_checkpoint
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.checkpoint_writer import remove_after
from xlstm_lm.training.engine import Judge, StepResult, TrainingEngine
from xlstm_lm.training.restore import continue_random_state, load_engine
from xlstm_lm.training.safeguards import SafeguardsConfig
from xlstm_lm.training.spikes import SpikeDetector

logger = logging.getLogger("xlstm_lm")

SHOWN = 20
"""Documents that a message names."""


class SpikeGuard:
    """Steps in a row whose update was not applied, with their documents, and the returns made so far.

    Without `safeguards.spike_threshold` it judges and counts nothing.
    """

    def __init__(self, config: SafeguardsConfig, lanes: range, device: torch.device, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint.

        Args:
            config: Section safeguards of the recipe.
            lanes: Lanes of this rank, one for each row of its batches.
            device: Device of losses and gradient norms.
            state: Result of `state`; empty for a new run, and for a checkpoint of a run without the guard.
        """
        self._config, self._lanes = config, lanes
        self.detector: SpikeDetector | None = None
        if config.spike_threshold is not None:
            recent = state.get("recent", ())
            self.detector = SpikeDetector(config.spike_threshold, config.spike_window, device, recent)
        self.in_a_row: int = state.get("in_a_row", 0)
        """Steps in a row, up to the last one, whose update was not applied."""
        self.step = 0
        """The last step observed; 0 before the first one of this session."""
        self.returns: list[int] = list(state.get("returns", ()))
        """Step of each return to a checkpoint."""
        documents = state.get("documents", {})
        self._documents = {lane: list(documents.get(str(lane), ())) for lane in lanes}

    @property
    def judge(self) -> Judge | None:
        """Judge for the engine; None without a threshold."""
        return self.detector.is_outlier if self.detector else None

    def observe(self, step: int, result: StepResult, batch: Batch) -> None:
        """Count a step (numbered from 1), and remember the documents of one whose update was not applied."""
        self.step = step
        if self.detector is None:
            return
        if result.applied:
            self.detector.accept()
            self.in_a_row = 0
            self._documents = {lane: [] for lane in self._lanes}
            return
        self.in_a_row += 1
        for lane, ids, places in zip(self._lanes, batch.document_ids, batch.document_places, strict=True):
            self._documents[lane] += [[name, place] for name, place in zip(ids, places, strict=True)]

    def outlier(self, result: StepResult) -> str:
        """Clause that says which numbers of a step are outliers; empty for other steps."""
        return self.detector.report() if self.detector and result.vetoed else ""

    @property
    def must_go_back(self) -> bool:
        """Whether there were more outliers in a row than safeguards.spike_patience."""
        return self.detector is not None and self.in_a_row > self._config.spike_patience

    @property
    def first_in_a_row(self) -> int:
        """The first of the steps in a row."""
        return self.step - self.in_a_row + 1

    @property
    def places(self) -> dict[str, list[Any]]:
        """Places of the documents in this rank's lanes, for `pass_over` of its stream."""
        return {str(lane): [place for _, place in documents] for lane, documents in self._documents.items()}

    def document_ids(self, world: World) -> list[str]:
        """Ids of the documents of all lanes, on rank 0. Collective."""
        return world.gather_distinct([name for documents in self._documents.values() for name, _ in documents])

    def check_limit(self, documents: list[str]) -> None:
        """Check that the run may go back once more.

        Args:
            documents: Ids of the documents of the outliers in a row.

        Raises:
            RunError: it has gone back too often.
        """
        config = self._config
        recent = [each for each in self.returns if each > self.step - config.spike_rollback_steps]
        if len(recent) < config.spike_rollbacks:
            return
        raise told_once(
            RunError(
                f"Step {self.step}: loss or gradient norm was an outlier or not finite for {self.in_a_row} steps in a "
                f"row, and the run has gone back {len(recent)} times within {config.spike_rollback_steps:,} steps, as "
                "often as safeguards.spike_rollbacks allows. The documents of these steps: "
                f"{some_of(documents, SHOWN)}. Look at them, lower optimizer.learning_rate, or raise "
                "safeguards.spike_threshold if the loss is as it should be; the checkpoints saved so far are intact."
            )
        )

    def return_event(self, step: int, documents: list[str], world: World) -> dict[str, Any]:
        """Fields of the event that reports a return, which rank 0 also logs.

        Args:
            step: Step of the checkpoint.
            documents: Ids of the documents of the outliers in a row.
            world: All processes of the run.
        """
        message = (
            f"Loss or gradient norm was an outlier or not finite for {self.in_a_row} steps in a row: went back from "
            f"step {self.step} to step {step}. The {len(documents)} documents of those steps are passed over."
        )
        if world.is_first:
            logger.warning(message)
        return {"step": step, "kind": "went back", "message": message, "from_step": self.step, "documents": documents}

    def state(self, world: World) -> dict[str, Any]:
        """Content of a checkpoint as JSON, on rank 0; empty without a threshold. Collective."""
        if self.detector is None:
            return {}
        documents = world.gather(self._documents) if self.in_a_row else []
        return {
            "recent": self.detector.state(),
            "in_a_row": self.in_a_row,
            "returns": self.returns,
            "documents": {str(lane): each for of_rank in documents for lane, each in of_rank.items()},
        }


def return_to_good_checkpoint(run_dir: Path, before: int, engine: TrainingEngine, world: World) -> Checkpoint:
    """Restore the newest checkpoint from before a step that is intact and finite, and delete later ones. Collective.

    Args:
        run_dir: Folder of the run.
        before: Step that the checkpoint must precede.
        engine: Engine of the run.
        world: All processes of the run.

    Raises:
        RunError: there is none.
    """
    folders = world.on_first(lambda: [folder for step, folder in checkpoint_folders(run_dir).items() if step < before])
    for folder in folders:
        problem = world.on_first(lambda folder=folder: damage(folder))
        if not problem:
            checkpoint = read_checkpoint(folder)
            if checkpoint.is_imported:
                continue
            broken = load_engine(checkpoint, engine, world)
            if not broken:
                continue_random_state(checkpoint, world)
                world.on_first(lambda step=checkpoint.state["step"]: remove_after(run_dir, step))
                return checkpoint
            problem = f"{folder} holds numbers that are not finite, in {listed(broken)}."
        if world.is_first:
            logger.warning("%s The checkpoint before it is tried.", problem)
    raise told_once(
        RunError(
            f"Step {before} and the following ones were outliers or not finite, and {run_dir} has no good checkpoint "
            "from before them to go back to. Lower training.checkpoint_every, or optimizer.learning_rate."
        )
    )
