"""A study: the runs of a grid over models and settings on one task, and the final accuracy of each."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.study import engine
from eval.study.engine import Grid, PlannedRun, RunState, examine
from eval.study.jobs import Outcome
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
from xlstm_lm.training.run_config import load_run_config

MEASURE_AGAIN = "Delete it to have it measured again."
SEED, LEARNING_RATE = "training.seed", "optimizer.learning_rate"


@dataclass(kw_only=True)
class StudyConfig:
    """The recipe of a study."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    """Title of the picture."""
    task: dict[str, Any]
    """The task's name and settings."""
    test: list[Count | list[Count]]
    """Cases to test: lengths of a formal language, [context, pairs] of recall."""
    test_sequences: Count = 512
    """Sequences of each case."""
    run: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of a training recipe that all runs share, without `data.task` and the fields that follow from it."""
    models: dict[str, dict[str, Any]]
    """Model section of each, which overrides that of `run`."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of fields of a run that are combined with each other, for every model. Of several learning rates and
    seeds, the seeds after the first are trained at the best learning rate alone."""


@dataclass(frozen=True)
class Study:
    """A study, checked and ready to run."""

    path: Path
    """The file that describes the study."""
    config: StudyConfig
    task: Task
    cases: list[Case]
    planned: list[PlannedRun]
    """The runs of the whole grid."""

    @property
    def runs(self) -> list[PlannedRun]:
        """The runs that are known to be needed: the whole grid with the first seed, and with the other seeds those of
        the best learning rate, as soon as that is known."""
        needed = {run.name for grid in self._grids() for run in grid.needed}
        return [run for run in self.planned if run.name in needed]

    def _grids(self) -> list[Grid]:
        """The planned runs in groups that differ in learning rate and seed alone."""
        groups: dict[tuple, list[PlannedRun]] = {}
        for run in self.planned:
            others = [(key, str(value)) for key, value in run.settings.items() if key not in (SEED, LEARNING_RATE)]
            groups.setdefault((run.model, *others), []).append(run)
        return [Grid(runs) for runs in groups.values()]


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
    return Study(path, config, task, cases, planned)


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
    return PlannedRun(model, run, settings)


def train_runs(study: Study, at_once: int, max_seconds: float | None = None) -> dict[str, Outcome]:
    """Train the needed runs that are not over, each in a process; return the outcomes of those that were begun.

    Raises:
        ValueError: a folder holds a run with another configuration.
    """
    engine.check_folders(study.runs, study.path, "--runs")
    return engine.train(lambda: study.runs, [sys.executable, "-m", "eval.tasks", "--run"], at_once, max_seconds)


def collect(study: Study) -> dict[str, Any]:
    """The results of the finished runs, and which runs are missing for what reason."""
    found, missing = [], []
    for run in study.runs:
        state = examine(run)
        if state.status == "finished":
            found.append(_measure(study, run, state))
        else:
            missing.append({"run": run.name, "reason": f"{state.status}: {state.problem}"})
    return {"runs": found, "missing": missing}


def _measure(study: Study, run: PlannedRun, state: RunState) -> dict[str, Any]:
    """The numbers of a finished run. Its answers are kept in the folder, and measured again only for other cases."""
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
    validation = state.last_validation
    return {
        "run": run.name,
        "model": run.model,
        "settings": run.settings,
        "parameters": count_parameters(run.config.model),
        "steps": run.config.training.steps,
        "training_answers": validation["tokens"],
        "validation_loss": validation["loss"],
        "seconds": validation["elapsed_seconds"],
        "cases": known["cases"],
    }
