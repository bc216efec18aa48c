"""A study: the runs of a grid over models and settings on one task, and what each of them can do in the end."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.study.jobs import Job, Outcome, run_jobs
from eval.study.study_file import check_section
from eval.tasks.accuracy import answer_cases
from eval.tasks.registry import build_task
from eval.tasks.task import Case, Task
from xlstm_lm import hub
from xlstm_lm.base.fields import Count
from xlstm_lm.base.mistakes import nearest
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.recipe import merge, read_recipe
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.runs.checkpoint import find_checkpoint
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.same_run import is_finished
from xlstm_lm.training.run_config import RunConfig, as_dict, as_recipe, load_run_config

MEASURE_AGAIN = "Delete it to have it measured again."
SEED, LEARNING_RATE = "training.seed", "optimizer.learning_rate"


@dataclass(kw_only=True)
class StudyConfig:
    """What a study's recipe says."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    """Over the picture."""
    task: dict[str, Any]
    """The task's name and settings."""
    test: list[Count | list[Count]]
    """Cases to test: lengths of a formal language, [context, pairs] of recall."""
    test_sequences: Count = 512
    """Sequences of each case."""
    run: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What all runs share: sections of a training recipe, `data.task` and what follows from it left out."""
    models: dict[str, dict[str, Any]]
    """The model section of each, on top of what `run` says of it."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of fields of a run that are combined with each other, for every model. Of several learning rates and
    seeds, the seeds after the first are trained at the best learning rate alone."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    model: str
    settings: dict[str, Any]
    """Its values of the grid's fields."""
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.training.folder

    @property
    def recipe(self) -> Path:
        """The file that its process reads, beside the folder."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def is_finished(self) -> bool:
        """Whether all of its steps are done.

        Raises:
            ValueError: the folder holds a run with another configuration.
        """
        return is_finished(as_dict(self.config))

    def last_validation(self) -> dict[str, Any]:
        """The record of it, of a finished run.

        Raises:
            ValueError: metrics.jsonl is damaged or has none.
        """
        folder = RunFolder(self.folder)
        record = folder.last_validation()
        if record is None:
            raise ValueError(f"{folder.metrics_path} has no validation, though the run is finished: restore it.")
        return record

    @property
    def loss(self) -> float:
        """The last of validation, of a finished run; infinite where it is not finite."""
        loss = self.last_validation()["loss"]
        return math.inf if loss is None else loss


@dataclass(frozen=True)
class Study:
    """A study, checked and ready to run."""

    config: StudyConfig
    task: Task
    cases: list[Case]
    planned: list[PlannedRun]
    """For the whole grid."""

    @property
    def runs(self) -> list[PlannedRun]:
        """Those that are known to be needed: the whole grid with the first seed, and with the other seeds what has the
        best learning rate, as soon as that is known."""
        found: dict[str, PlannedRun] = {}
        for alike in self._groups().values():
            first_seed = [run for run in alike if run.settings.get(SEED) == alike[0].settings.get(SEED)]
            found |= {run.name: run for run in first_seed}
            if all(run.is_finished for run in first_seed):
                rate = min(first_seed, key=lambda run: run.loss).settings.get(LEARNING_RATE)
                found |= {run.name: run for run in alike if run.settings.get(LEARNING_RATE) == rate}
        return [run for run in self.planned if run.name in found]

    def _groups(self) -> dict[tuple, list[PlannedRun]]:
        """The planned runs that differ in learning rate and seed alone."""
        groups: dict[tuple, list[PlannedRun]] = {}
        for run in self.planned:
            others = [(key, str(value)) for key, value in run.settings.items() if key not in (SEED, LEARNING_RATE)]
            groups.setdefault((run.model, *others), []).append(run)
        return groups


def load_study(path: Path, folder: Path, only: Iterable[str] = ()) -> Study:
    """The study of a recipe, its runs below `folder`; of all models or of those that `only` names.

    Raises:
        ValueError: something in the recipe is not known or not allowed, or `only` names a model that it does not have.
    """
    values, origins = read_recipe(path)
    config = check_section(StudyConfig, values, origins=origins, path=path)
    try:
        task = build_task(config.task)
        cases = [tuple(case) if isinstance(case, list) else (case,) for case in config.test]
        for case in cases:
            task.check(case)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not config.models or not cases or not all(config.grid.values()):
        raise ValueError(f"{path}: models, test and each list of grid must not be empty.")
    for name in only:
        if name not in config.models:
            hint = nearest(name, config.models, otherwise="There are {known}.")
            raise ValueError(f"--only {name}: {path} has no such model. {hint}")
    planned = [
        _plan(path, folder, config, task, model, dict(zip(config.grid, combination, strict=True)))
        for combination in itertools.product(*config.grid.values())  # all models of a seed before the next seed
        for model in (only or config.models)
    ]
    names = [run.name for run in planned]
    if alike := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: several runs are called {alike[0]}; give each value of grid once, and models apart.")
    return Study(config, task, cases, planned)


def _plan(
    path: Path, folder: Path, config: StudyConfig, task: Task, model: str, settings: dict[str, Any]
) -> PlannedRun:
    parts = [model, *(f"{key.split('.')[-1]}-{value}" for key, value in settings.items())]
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")
    own = {
        "model": {"vocab_size": len(task.symbols)} | config.models[model],
        "data": {"task": config.task, "sources": [], "validation": [], "num_workers": 0},
        "training": {"run_dir": str(folder / name)},
    }
    try:
        run = load_run_config([], merge(config.run, own) | settings)
    except ValueError as error:
        message = re.sub(r"flag --[\w.]+(, flag --[\w.]+)*: ", "", str(error))
        raise ValueError(f"{path}, run {name}: {message}") from None
    return PlannedRun(name, model, settings, run)


def train_runs(study: Study, at_once: int, max_seconds: float | None = None) -> dict[str, Outcome]:
    """Train what is needed and not finished, each run in a process; gives how those that were begun have ended.

    Raises:
        ValueError: a folder holds a run with another configuration.
    """
    begun: set[str] = set()

    def next_jobs() -> list[Job]:
        jobs = [_job(run) for run in study.runs if run.name not in begun and not run.is_finished]
        begun.update(job.name for job in jobs)
        return jobs

    return run_jobs(next_jobs(), at_once, then=lambda outcome: next_jobs(), max_seconds=max_seconds)


def _job(run: PlannedRun) -> Job:
    run.recipe.parent.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(as_recipe(run.config), encoding="utf-8")
    command = [sys.executable, "-m", "eval.tasks", "--run", str(run.recipe)]
    return Job(name=run.name, command=command, log=run.recipe.with_suffix(".log"))


def collect(study: Study, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What the finished runs can do, and which are missing for what reason."""
    found, missing = [], []
    for run in study.runs:
        if run.is_finished:
            found.append(_measure(study, run))
            continue
        outcome = outcomes.get(run.name)
        failed = outcome is not None and outcome.code and not outcome.asked_to_stop
        reason = f"failed with code {outcome.code}, see {run.recipe.with_suffix('.log')}" if failed else "not finished"
        missing.append({"run": run.name, "reason": reason})
    return {"runs": found, "missing": missing}


def _measure(study: Study, run: PlannedRun) -> dict[str, Any]:
    """A finished run's numbers; its answers are kept in the folder, and asked for again only where others are."""
    checkpoint = find_checkpoint(run.folder)
    asked = {
        "checkpoint": checkpoint.name,
        "test": [list(case) for case in study.cases],
        "test_sequences": study.config.test_sequences,
    }
    path = run.folder / "accuracy.json"
    known = read_json(path, remedy=MEASURE_AGAIN) if path.is_file() else {}
    if {key: known.get(key) for key in asked} != asked:
        model = hub.load(checkpoint).model
        known = asked | {"cases": answer_cases(model, study.task, study.cases, study.config.test_sequences)}
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    validation = run.last_validation()
    return {
        "run": run.name,
        "model": run.model,
        "settings": run.settings,
        "parameters": count_parameters(run.config.model),
        "steps": run.config.training.steps,
        "training_answers": validation["tokens"],
        "validation_loss": run.loss,
        "seconds": validation["elapsed_seconds"],
        "cases": known["cases"],
    }
