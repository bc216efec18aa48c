"""The trained models of the study of gradient reach: its configuration, and the runs that are trained or taken again.

Every model is trained by `python -m xlstm_lm train` with the same recipe, in a folder of its own. A run that has got to
its end is not begun again.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.study.jobs import Job, alone_in, run_jobs
from eval.study.study_file import check_section
from xlstm_lm.base.fields import Count, Positive, Size, check_fields
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.runs.same_run import is_finished
from xlstm_lm.training.run_config import RunConfig, as_dict, load_run_config


@dataclass(kw_only=True)
class StudyConfig:
    """What a study's file says; its paths of recipes are relative to it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    recipe: str
    """Recipe that all models are trained with: everything but the model."""
    models: dict[str, str]
    """Recipes of the models, by their names in the table and the picture."""
    learning_rates: dict[str, Positive] = field(default_factory=dict)
    """Peak learning rates other than the recipe's, by the models' names."""
    run_dir: str = "runs/gradient-reach"
    """Folder of the runs."""
    windows: Count = 64
    """Windows to measure on, each as long as a training row."""
    at_once: Size = 1
    """Runs trained at a time."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.models:
            raise ValueError("models is empty; name a recipe, such as LSTM: ../model/lstm-cpu-0.7m.yaml.")
        if not self.run_dir:
            raise ValueError("run_dir is empty; give the folder of the runs, such as runs/gradient-reach.")
        folders = [folder_name(name) for name in self.models]
        if len(set(folders)) < len(folders):
            raise ValueError(f"models has names that share a folder ({', '.join(folders)}); tell them apart.")
        if unknown := self.learning_rates.keys() - self.models.keys():
            raise ValueError(f"learning_rates names {', '.join(sorted(unknown))}; models has {', '.join(self.models)}.")


@dataclass(frozen=True)
class StudyRun:
    """One model's training."""

    name: str
    config: RunConfig
    command: list[str]

    @property
    def folder(self) -> Path:
        """That it writes to."""
        return self.config.training.folder

    @property
    def tokens(self) -> int:
        """That it is trained on."""
        data = self.config.data
        return self.config.training.steps * data.global_batch_size * data.context_length

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder.parent / f"{self.folder.name}.log"


def folder_name(name: str) -> str:
    """A model's name as that of a folder: xLSTM[1:1] becomes xlstm-1-1."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def load_study(path: Path) -> tuple[StudyConfig, list[StudyRun]]:
    """Read a study's file, and check every run of it.

    Raises:
        ValueError: the file, a recipe or a value cannot be used.
    """
    values, origins = read_recipe(path)
    config = check_section(StudyConfig, values, origins=origins, path=path)
    return config, [_make_run(path, config, name) for name in config.models]


def _make_run(path: Path, config: StudyConfig, name: str) -> StudyRun:
    recipes = [str(path.parent / recipe) for recipe in (config.recipe, config.models[name])]
    overrides: dict[str, Any] = {"training.run_dir": str(Path(config.run_dir) / folder_name(name))}
    if name in config.learning_rates:
        overrides["optimizer.learning_rate"] = config.learning_rates[name]
    run = StudyRun(name, load_run_config(recipes, overrides), [sys.executable, "-m", "xlstm_lm", "train"])
    run.command.extend(flag for recipe in recipes for flag in ("--config", recipe))
    run.command.extend(part for flag, value in overrides.items() for part in (f"--{flag}", str(value)))
    return run


def train_runs(runs: list[StudyRun], at_once: int, max_seconds: float | None = None) -> None:
    """Train what is not trained yet, so many at a time; what was stopped goes on.

    Raises:
        ValueError: a folder holds another run, or a run has not got to its end.
    """
    jobs = [Job(name=run.name, command=run.command, log=run.log) for run in _unfinished(runs)]
    with alone_in(runs[0].folder.parent):
        run_jobs(jobs, at_once, max_seconds=max_seconds)
    if unfinished := [f"{run.name} ({run.log})" for run in _unfinished(runs)]:
        raise ValueError(f"Not trained to the end: {', '.join(unfinished)}. The same command goes on with them.")


def _unfinished(runs: list[StudyRun]) -> list[StudyRun]:
    return [run for run in runs if not is_finished(as_dict(run.config))]
