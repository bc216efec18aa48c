"""Trains the runs of a comparison: first each model's grid of learning rates, then the other seeds at its best."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence

from eval.compare.config import Model
from eval.compare.runs import FAILURE_FILE, PlannedRun, Runs, examine
from eval.study.jobs import Job, Outcome, run_jobs
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.run_config import as_recipe


def to_train(runs: Runs, only: Sequence[str]) -> list[PlannedRun]:
    """The runs that are known to be needed and are not over, in the order in which they are trained."""
    return [run for model in runs.models for run in _left(runs, model, only)]


def train_all(
    runs: Runs, only: Sequence[str], *, at_once: int, launch: Sequence[str], max_seconds: float | None
) -> dict[str, Outcome]:
    """Train until all runs are over, somebody asks to stop, or the time is up; gives how each job has ended.

    A run that is there is reused, an unfinished one continued, one that failed begun once more.

    Args:
        runs: of the comparison.
        only: patterns of names of runs (or of models, for all their runs).
        at_once: runs at a time.
        launch: what starts a module, such as [python, -m].
        max_seconds: for all.

    Raises:
        ValueError: a folder holds a run of another configuration.
    """
    runs.check_folders()
    owners: dict[str, Model] = {}

    def jobs(planned: Sequence[PlannedRun]) -> list[Job]:
        owners.update({run.name: run.model for run in planned})
        return [_job(run, launch) for run in planned]

    def then(outcome: Outcome) -> list[Job]:
        model = owners[outcome.name]
        run = next(run for run in runs.needed(model) if run.name == outcome.name)
        if outcome.code and not outcome.asked_to_stop:
            (run.folder / FAILURE_FILE).write_text(outcome.last_lines + "\n", encoding="utf-8")
        return jobs([run for run in _left(runs, model, only) if run.name not in owners])

    return run_jobs(jobs(to_train(runs, only)), at_once, then=then, max_seconds=max_seconds)


def is_chosen(run: PlannedRun, only: Sequence[str]) -> bool:
    """Whether the patterns, if there are any, name the run or its model."""
    return not only or any(fnmatch.fnmatch(name, each) for each in only for name in (run.name, run.model.name))


def _left(runs: Runs, model: Model, only: Sequence[str]) -> list[PlannedRun]:
    return [run for run in runs.needed(model) if is_chosen(run, only) and not examine(run).is_over]


def _job(run: PlannedRun, launch: Sequence[str]) -> Job:
    run.folder.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run.folder)
    folder.write_config(as_recipe(run.config))  # where there was one, it said the same of all that counts
    (run.folder / FAILURE_FILE).unlink(missing_ok=True)
    command = [*(launch or [sys.executable, "-m"]), "xlstm_lm", "train", "--config", str(folder.config_path)]
    return Job(name=run.name, command=command, log=run.folder / "output.log")
