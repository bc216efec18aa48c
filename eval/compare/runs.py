"""The runs of a comparison: first each model's grid of learning rates, then the other seeds at its best."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.compare.config import Comparison, Model
from eval.study import engine
from eval.study.engine import Grid, PlannedRun
from eval.study.jobs import Outcome

FREE = (
    "training.run_dir",
    "training.resume",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "data.num_workers",
    "data.prefetch_batches",
    "model.scan_backend",  # which runs of before it was a field do not have
    "wandb.",
)
"""Fields in which an existing run may differ from the comparison's."""


class Runs:
    """The runs of a comparison in a folder."""

    def __init__(self, comparison: Comparison, out: Path) -> None:
        self.comparison = comparison
        self.out = out
        self.models = comparison.models

    @functools.cached_property
    def grids(self) -> dict[str, Grid]:
        """The runs of each model, by its name."""
        return {model.name: self._plan(model) for model in self.models}

    def _plan(self, model: Model) -> Grid:
        runs = []
        for rate, seed in itertools.product(model.learning_rates, self.comparison.config.seeds):
            folder = self.out / "runs" / f"{model.name}-lr{rate:g}-seed{seed}"
            runs.append(PlannedRun(model.name, self.comparison.run_config(model, rate, seed, folder)))
        return Grid(runs)

    @property
    def needed(self) -> list[PlannedRun]:
        """All runs that are known to be needed."""
        return [run for grid in self.grids.values() for run in grid.needed]

    def check_folders(self) -> None:
        """Refuse to continue in a folder with runs of another configuration.

        Raises:
            ValueError: names each run and each field that differs.
        """
        engine.check_folders(self.needed, self.comparison.path, "--out", FREE)


def is_chosen(run: PlannedRun, only: Sequence[str]) -> bool:
    """Whether the patterns, if there are any, name the run or its model."""
    return not only or any(fnmatch.fnmatch(name, each) for each in only for name in (run.name, run.model))


def chosen(runs: Runs, only: Sequence[str]) -> list[PlannedRun]:
    """The runs that are known to be needed and that the patterns name, in the order in which they are trained."""
    return [run for run in runs.needed if is_chosen(run, only)]


def to_train(runs: Runs, only: Sequence[str]) -> list[PlannedRun]:
    """The chosen runs that are not over."""
    return engine.left(chosen(runs, only))


def train_all(
    runs: Runs, only: Sequence[str], *, at_once: int, launch: Sequence[str], max_seconds: float | None
) -> dict[str, Outcome]:
    """Train the chosen runs by the study engine and return the outcome of each job.

    Args:
        runs: of the comparison.
        only: patterns of names of runs (or of models, for all their runs).
        at_once: runs at a time.
        launch: starts a module, such as [python, -m], which is the default.
        max_seconds: for all; None for no limit.

    Raises:
        ValueError: a folder holds a run of another configuration.
    """
    runs.check_folders()
    command = [*(launch or [sys.executable, "-m"]), "xlstm_lm", "train", "--config"]
    return engine.train(lambda: chosen(runs, only), command, at_once, max_seconds)
