"""The folder of a run: names, readers and writers of all its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.durable_files import disk_errors_explained, replace_durably
from xlstm_lm.base.read_files import NUMBER_OR_NULL, Fields, Line, json_lines, read_json
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.base.run_layout import (
    CONFIG,
    CURVE,
    ENVIRONMENT,
    HUB_COMMITS,
    LIBRARY_LOG,
    METRICS,
    MODEL_RECIPE,
    ORIGIN,
    PROFILE,
    SAMPLES,
    SUPERSEDED,
    TOKENIZER,
    WANDB_ID,
    checkpoint_folders,
    run_of_checkpoint,
)

logger = logging.getLogger("xlstm_lm")

COMMON: Fields = {"split": str, "step": int}
"""Fields of every line of metrics.jsonl."""
MEASURED: Fields = {"tokens": int}
"""Further fields of every line about training or validation."""
NUMBERS = ("loss", "bits_per_byte", "perplexity", "elapsed_seconds", "tokens_per_second")
"""Optional numbers that readers use; null if not finite."""


@dataclass(frozen=True)
class MetricsSplit:
    """Lines of metrics.jsonl, split at a step."""

    step: int
    kept: list[bytes]
    """Sound lines up to the step."""
    cut: list[bytes]
    """Later lines and damaged ones."""
    last_step: int
    """Step of the latest sound line; 0 without any."""


class RunFolder:
    """The folder of a run or, for reading its configuration, of a checkpoint.

    Every method that reads raises ValueError if its file is damaged: empty, cut short, not UTF-8, or of another type.
    The message names the file and the remedy. An unfinished last line of metrics.jsonl is ignored and does not count as
    damage, because a killed run leaves one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / CONFIG
        self.metrics_path = self.path / METRICS
        self.superseded_path = self.path / SUPERSEDED
        self.curve_path = self.path / CURVE
        self.library_log_path = self.path / LIBRARY_LOG
        self.model_recipe_path = self.path / MODEL_RECIPE
        self.tokenizer_path = self.path / TOKENIZER
        self.origin_path = self.path / ORIGIN
        self.profile_path = self.path / PROFILE
        self._environment_path = self.path / ENVIRONMENT
        self._wandb_id_path = self.path / WANDB_ID
        self._hub_commits_path = self.path / HUB_COMMITS

    @classmethod
    def of_checkpoint(cls, folder: Path) -> RunFolder | None:
        """Return the run whose folder holds a checkpoint; None for a checkpoint outside of a run."""
        run_dir = run_of_checkpoint(folder)
        return None if run_dir is None else cls(run_dir)

    def checkpoints(self) -> dict[int, Path]:
        """Map steps to the folders of checkpoints, newest first, including damaged ones."""
        return checkpoint_folders(self.path)

    def config(self) -> dict[str, Any]:
        """Read the sections of config.yaml, which include `model`."""
        return read_config(self.config_path)

    def write_config(self, config_yaml: str) -> None:
        """Write config.yaml."""
        replace_durably(self.config_path, config_yaml.encode())

    def hub_commits(self) -> list[list[Any]]:
        """Read data set, revision in the recipe and commit of each source on the hub; empty for a run without any."""
        if not self._hub_commits_path.exists():
            return []
        remedy = "Delete it to read the newest commits; a run with a checkpoint then still continues with its own."
        return read_json(self._hub_commits_path, {"commits": list}, remedy)["commits"]

    def write_hub_commits(self, commits: Sequence[Sequence[Any]]) -> None:
        """Write data set, revision in the recipe and commit of each source on the hub; no file without any."""
        if commits:
            value = {"commits": [list(each) for each in commits]}
            replace_durably(self._hub_commits_path, json.dumps(value, indent=2).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl, first to last; empty without that file."""
        lines = [line for line in self._metric_lines() if not line.is_torn]
        for line in lines:
            if line.problem:
                raise ValueError(self._damaged_line(line))
        return [line.value for line in lines]

    def sound_metrics(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Read the records of metrics.jsonl that are sound, first to last, and a sentence for each damaged line."""
        try:
            lines = self._metric_lines()
        except ValueError as error:
            return [], [str(error)]
        damaged = [line for line in lines if line.problem and not line.is_torn]
        return [line.value for line in lines if not line.problem], [self._damaged_line(line) for line in damaged]

    def split(self, step: int) -> MetricsSplit:
        """Split the lines of metrics.jsonl at a step, without changing the file.

        A damaged line after the last line that is kept is announced and cut.

        Raises:
            ValueError: a line before the last that is kept is damaged.
        """
        lines = self._metric_lines()
        kept = [line for line in lines if not line.problem and line.value["step"] <= step]
        end = kept[-1].number if kept else 0
        for line in (line for line in lines if line.problem and not line.is_torn):
            if line.number < end:
                raise ValueError(self._damaged_line(line))
            announce_once(f"{self.metrics_path}, line {line.number}, is damaged and left out: {line.problem}.")
        stays = {line.number for line in kept}
        return MetricsSplit(
            step=step,
            kept=[line.content for line in kept],
            cut=[line.content for line in lines if line.number not in stays],
            last_step=max((line.value["step"] for line in lines if not line.problem), default=0),
        )

    def point_out_lost_metrics(self, split: MetricsSplit, checkpoint: Path) -> None:
        """Warn if metrics.jsonl ends before the checkpoint at the split, because each save flushes that file first."""
        log_every = RunFolder(checkpoint).config().get("training", {}).get("log_every")
        if isinstance(log_every, int) and split.last_step <= split.step - log_every:
            ends = f"ends at step {split.last_step}" if split.last_step else "has no line"
            announce_once(
                f"{self.metrics_path} {ends}, but {checkpoint} is of step {split.step}: what came between is lost. The "
                "run goes on without it; to have it back, stop the run and restore the file from a copy."
            )

    def last_validation(self) -> dict[str, Any] | None:
        """Return the newest record of a validation; None without any."""
        return next((record for record in reversed(self.metrics()) if record["split"] == "validation"), None)

    def add_sample(self, step: int, prompt: str, text: str) -> None:
        """Append a text that the run's model generated to samples.jsonl."""
        path = self.path / SAMPLES
        with disk_errors_explained(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")

    def environment(self) -> list[dict[str, Any]]:
        """Read the sessions in environment.json, first to last; empty without that file."""
        path = self._environment_path
        remedy = "Move it away: no run depends on it."
        if not path.is_file():
            return []
        sessions = read_json(path, {"sessions": list}, remedy)["sessions"]
        if not all(isinstance(session, dict) for session in sessions):
            raise ValueError(f"{path} is damaged: not all of its sessions are objects. {remedy}")
        return sessions

    def add_session(self, session: dict[str, Any]) -> None:
        """Append a session to environment.json. A damaged file is renamed and a new one begun."""
        path = self._environment_path
        try:
            sessions = self.environment()
        except ValueError as error:
            names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            logger.warning("%s It is kept as %s, and a new one begun.", error, kept.name)
            sessions = []
        replace_durably(path, json.dumps({"sessions": [*sessions, session]}, indent=2).encode())

    def wandb_id(self) -> str | None:
        """Read the run's id at Weights & Biases from wandb.json; None if it has none yet."""
        if not self._wandb_id_path.is_file():
            return None
        remedy = 'Write the run\'s id at Weights & Biases there, as {"id": ...}, or delete the file for a new one.'
        return read_json(self._wandb_id_path, {"id": str}, remedy)["id"]

    def write_wandb_id(self, wandb_id: str) -> None:
        """Write the run's id at Weights & Biases to wandb.json."""
        replace_durably(self._wandb_id_path, json.dumps({"id": wandb_id}).encode())

    def _metric_lines(self) -> list[Line]:
        if not self.metrics_path.is_file():
            return []
        return [_checked(line) for line in json_lines(self.metrics_path, COMMON)]

    def _damaged_line(self, line: Line) -> str:
        return (
            f"{self.metrics_path}, line {line.number}, is damaged: {line.problem}. Restore the file from a copy, or "
            "delete that line."
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run or a checkpoint. That of an imported model has the section `model` alone.

    Raises:
        ValueError: the file is missing or damaged; names it.
    """
    remedy = "Restore it from a copy: each checkpoint of a run has one of its own, checkpoints/step_*/config.yaml."
    if not path.is_file():
        raise ValueError(f"{path} is missing. {remedy}")
    try:
        config, _ = read_recipe(path)
    except (ValueError, RecursionError) as error:
        named = "" if str(path) in str(error) else f"{path} is damaged: "
        raise ValueError(f"{named}{str(error).rstrip('. ')}. {remedy}") from error
    for name, section in config.items():
        if not isinstance(section, dict):
            raise ValueError(f"{path} is damaged: {name} is {section!r}, which is no section with fields. {remedy}")
    if "preset" in config.get("model", {}):  # a run writes the fields that a preset stands for
        raise ValueError(f"{path} is damaged: model is {config['model']['preset']!r}, which is no section. {remedy}")
    if not config.get("model"):
        raise ValueError(f"{path} is damaged: it has no section 'model'. {remedy}")
    return config


def _checked(line: Line) -> Line:
    """Mark a line of metrics.jsonl as damaged if a field that readers use as a number is not one."""
    record = line.value
    required = MEASURED if record.get("split") in ("train", "validation") else {}
    wrong = [name for name, types in required.items() if not isinstance(record.get(name, ""), types)]
    wrong += [name for name in NUMBERS if not isinstance(record.get(name), NUMBER_OR_NULL)]
    return dataclasses.replace(line, problem=f"its {wrong[0]!r} is no number") if wrong else line
