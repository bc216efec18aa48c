"""The trained models of the study of gradient reach: its configuration, and its runs, all with the same recipe."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.study import engine
from eval.study.engine import PlannedRun, examine
from eval.study.jobs import alone_in
from eval.study.study_file import check_section
from xlstm_lm.base.fields import Count, Positive, Size, check_fields
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.models.presets import preset_fields
from xlstm_lm.training.run_config import load_run_config


@dataclass(kw_only=True)
class StudyConfig:
    """The file of a study; paths of recipes in it are relative to its folder."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    recipe: str
    """Recipe that all models are trained with: everything but the model."""
    models: dict[str, str]
    """Presets or recipes of the models, by their names in the table and the picture."""
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
            raise ValueError("models is empty; name a preset or a recipe, such as LSTM: lstm-cpu-0.7m.")
        for name, model in self.models.items():
            if not _is_recipe(model):
                try:
                    preset_fields(model)
                except ValueError as error:
                    raise ValueError(f"models: {name} = {error}") from None
        if not self.run_dir:
            raise ValueError("run_dir is empty; give the folder of the runs, such as runs/gradient-reach.")
        folders = [folder_name(name) for name in self.models]
        if len(set(folders)) < len(folders):
            raise ValueError(f"models has names that share a folder ({', '.join(folders)}); tell them apart.")
        if unknown := self.learning_rates.keys() - self.models.keys():
            raise ValueError(f"learning_rates names {', '.join(sorted(unknown))}; models has {', '.join(self.models)}.")


def folder_name(name: str) -> str:
    """A model's name as that of a folder: xLSTM[1:1] becomes xlstm-1-1."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _is_recipe(model: str) -> bool:
    """Whether a model is the path of a recipe; else it is a preset."""
    return model.endswith((".yaml", ".yml"))


def load_study(path: Path) -> tuple[StudyConfig, list[PlannedRun]]:
    """Read a study's file, and check every run of it.

    Raises:
        ValueError: the file, a recipe or a value cannot be used.
    """
    values, origins = read_recipe(path)
    config = check_section(StudyConfig, values, origins=origins, path=path)
    return config, [_make_run(path, config, name) for name in config.models]


def _make_run(path: Path, config: StudyConfig, name: str) -> PlannedRun:
    model = config.models[name]
    recipes: list[str | Path] = [path.parent / config.recipe]
    overrides: dict[str, Any] = {"training.run_dir": str(Path(config.run_dir) / folder_name(name))}
    if _is_recipe(model):
        recipes.append(path.parent / model)
    else:
        overrides["model"] = model
    if name in config.learning_rates:
        overrides["optimizer.learning_rate"] = config.learning_rates[name]
    return PlannedRun(name, load_run_config(recipes, overrides))


def train_runs(path: Path, runs: list[PlannedRun], at_once: int, max_seconds: float | None = None) -> None:
    """Train what is not trained yet, so many at a time; what was stopped goes on.

    Raises:
        ValueError: a folder holds another run, or a run has not got to its end.
    """
    engine.check_folders(runs, path, "run_dir")
    with alone_in(runs[0].folder.parent):
        engine.train(lambda: runs, [sys.executable, "-m", "xlstm_lm", "train", "--config"], at_once, max_seconds)
    if unfinished := [f"{run.model} ({run.log})" for run in runs if examine(run).status != "finished"]:
        raise ValueError(f"Not trained to the end: {', '.join(unfinished)}. The same command goes on with them.")
