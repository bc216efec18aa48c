"""The files of a run's folder, read in one place: whoever wants to know of a run reads them through `RunFolder`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xlstm_lm.base.read_files import NUMBER_OR_NULL, Fields, Line, json_lines, read_json
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.ops.announce import announce_once

COMMON: Fields = {"split": str, "step": int}
MEASURED: Fields = {"tokens": int}
"""In every line of metrics.jsonl about training or validation."""
NUMBERS = ("loss", "bits_per_byte", "perplexity", "elapsed_seconds", "tokens_per_second")
"""Further numbers that readers use; null where they are not finite."""


class RunFolder:
    """A run's folder, or, for `config`, a checkpoint's. Reads, never writes.

    Every method raises ValueError where its file is damaged: empty, cut short, no UTF-8, or of another type; the
    message names the file and what to do. (A last line of metrics.jsonl that was never finished is no damage: that is
    how a killed run leaves it.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def config(self) -> dict[str, Any]:
        """The sections in config.yaml, with at least that of the model."""
        return read_config(self.path / "config.yaml")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, first to last; none where there is no such file."""
        lines = self._metric_lines()
        for line in lines:
            if line.problem:
                raise ValueError(self._damaged_line(line))
        return [line.value for line in lines]

    def metric_lines(self, up_to: int) -> list[str]:
        """The lines of metrics.jsonl, as they stand, up to a step. Damage behind the last of them does not count, but
        is pointed out."""
        lines = self._metric_lines()
        kept = [line for line in lines if not line.problem and line.value["step"] <= up_to]
        end = kept[-1].number if kept else 0
        for line in (line for line in lines if line.problem):
            if line.number < end:
                raise ValueError(self._damaged_line(line))
            announce_once(f"{self._metrics_path}, line {line.number}, is damaged and left out: {line.problem}.")
        return [line.text for line in kept]

    def point_out_lost_metrics(self, checkpoint: Path, step: int) -> None:
        """Warn where metrics.jsonl ends before a checkpoint of the run, although each save writes it through first."""
        log_every = RunFolder(checkpoint).config().get("training", {}).get("log_every")
        last = max((line.value["step"] for line in self._metric_lines() if not line.problem), default=0)
        if isinstance(log_every, int) and last <= step - log_every:
            ends = f"ends at step {last}" if last else "has no line"
            announce_once(
                f"{self._metrics_path} {ends}, but {checkpoint} is of step {step}: what came between is lost. The run "
                "goes on without it; to have it back, stop the run and restore the file from a copy."
            )

    def last_validation(self) -> dict[str, Any] | None:
        """The newest record of held-out documents; None where there is none."""
        return next((record for record in reversed(self.metrics()) if record["split"] == "validation"), None)

    def checkpoints(self) -> dict[int, Path]:
        """The folders of its checkpoints by step, newest first, damaged ones included."""
        return checkpoint_folders(self.path)

    def environment(self) -> list[dict[str, Any]]:
        """The sessions in environment.json, first to last; none where there is no such file."""
        path = self.path / "environment.json"
        remedy = "Move it away: no run depends on it."
        if not path.is_file():
            return []
        sessions = read_json(path, {"sessions": list}, remedy)["sessions"]
        if not all(isinstance(session, dict) for session in sessions):
            raise ValueError(f"{path} is damaged: not all of its sessions are objects. {remedy}")
        return sessions

    def wandb_id(self) -> str | None:
        """The id in wandb.json that the run has at Weights & Biases; None where none was drawn yet."""
        path = self.path / "wandb.json"
        if not path.is_file():
            return None
        remedy = 'Write the run\'s id at Weights & Biases there, as {"id": ...}, or delete the file for a new one.'
        return read_json(path, {"id": str}, remedy)["id"]

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def _metric_lines(self) -> list[Line]:
        if not self._metrics_path.is_file():
            return []
        return [_checked(line) for line in json_lines(self._metrics_path, COMMON)]

    def _damaged_line(self, line: Line) -> str:
        return (
            f"{self._metrics_path}, line {line.number}, is damaged: {line.problem}. Restore the file from a copy, or "
            "delete that line."
        )


def read_config(path: Path) -> dict[str, Any]:
    """The sections of the config.yaml of a run or a checkpoint; an imported model's has no section but the model's.

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
    if not config.get("model"):
        raise ValueError(f"{path} is damaged: it has no section 'model'. {remedy}")
    return config


def _checked(line: Line) -> Line:
    """A line of metrics.jsonl; one with another type than a number where readers use a number is damaged, too."""
    record = line.value
    required = MEASURED if record.get("split") in ("train", "validation") else {}
    wrong = [name for name, types in required.items() if not isinstance(record.get(name, ""), types)]
    wrong += [name for name in NUMBERS if not isinstance(record.get(name), NUMBER_OR_NULL)]
    return dataclasses.replace(line, problem=f"its {wrong[0]!r} is no number") if wrong else line
