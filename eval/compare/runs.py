"""The runs of a comparison: their folders, how far each is, and which learning rate of a model was best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compare.config import Comparison, Model
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.same_run import differing_fields
from xlstm_lm.training.run_config import RunConfig, as_dict

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
"""Fields in which a run that is there may differ from what the comparison asks for."""
FAILURE_FILE = "failure.txt"
"""In a run's folder: the end of its output, where its last session failed."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that the comparison needs."""

    model: Model
    learning_rate: float
    seed: int
    folder: Path
    config: RunConfig

    @property
    def name(self) -> str:
        """Such as mamba2-1m-lr0.004-seed0."""
        return self.folder.name


@dataclass(frozen=True)
class RunState:
    """How far a run is, from what lies in its folder."""

    status: str
    """finished, unfinished, diverged, failed or missing."""
    problem: str
    """Why it is not finished, in a sentence."""
    records: list[dict[str, Any]]
    """Of metrics.jsonl."""

    @property
    def is_over(self) -> bool:
        """Whether more training would change nothing."""
        return self.status in ("finished", "diverged")

    @property
    def validation(self) -> float:
        """Bits per byte, or nats a token where the tokens are no text, of the last validation; infinite if diverged."""
        last = next((each for each in reversed(self.records) if each["split"] == "validation"), {})
        value = last.get("loss") if last.get("bits_per_byte") is None else last["bits_per_byte"]
        return math.inf if value is None or self.status == "diverged" else value


class Runs:
    """The runs of a comparison in a folder."""

    def __init__(self, comparison: Comparison, out: Path) -> None:
        self.comparison = comparison
        self.out = out
        self.models = comparison.models
        self._planned: dict[Path, PlannedRun] = {}

    def planned(self, model: Model, learning_rate: float, seed: int) -> PlannedRun:
        """The run of a model."""
        folder = self.out / "runs" / f"{model.name}-lr{learning_rate:g}-seed{seed}"
        if folder not in self._planned:
            config = self.comparison.run_config(model, learning_rate, seed, folder)
            self._planned[folder] = PlannedRun(model, learning_rate, seed, folder, config)
        return self._planned[folder]

    def grid(self, model: Model) -> list[PlannedRun]:
        """One run for each learning rate, of the first seed."""
        return [self.planned(model, rate, self.comparison.config.seeds[0]) for rate in model.learning_rates]

    def best(self, model: Model) -> float | None:
        """The learning rate with the lowest validation loss, of equal ones the lowest; None until all runs of the grid
        are over, or where all diverged."""
        states = {run.learning_rate: examine(run) for run in self.grid(model)}
        if not all(state.is_over for state in states.values()):
            return None
        rate = min(states, key=lambda rate: (states[rate].validation, rate))
        return rate if math.isfinite(states[rate].validation) else None

    def final(self, model: Model) -> list[PlannedRun]:
        """One run for each seed at the best learning rate; none until that is known."""
        rate = self.best(model)
        return [] if rate is None else [self.planned(model, rate, seed) for seed in self.comparison.config.seeds]

    def needed(self, model: Model) -> list[PlannedRun]:
        """All runs of a model that are known to be needed."""
        return list({run.name: run for run in self.grid(model) + self.final(model)}.values())

    def check_folders(self) -> None:
        """Refuse to go on where runs of another configuration lie.

        Raises:
            ValueError: names each run and each field that differs.
        """
        different = []
        for run in (run for model in self.models for run in self.needed(model)):
            if RunFolder(run.folder).config_path.is_file():
                there = RunFolder(run.folder).config()
                fields = differing_fields(_without_places(there), _without_places(as_dict(run.config)), FREE)
                different += [f"{run.name}:", *fields] if fields else []
        if different:
            raise ValueError(
                f"{self.out} holds runs of another configuration than {self.comparison.path} describes:\n"
                + "\n".join(different)
                + "\nSet these fields back, take those folders away, or choose another --out."
            )


def examine(run: PlannedRun) -> RunState:
    """How far a run is.

    Raises:
        ValueError: its metrics.jsonl is damaged.
    """
    folder = RunFolder(run.folder)
    records = folder.metrics()
    steps, done = run.config.training.steps, max(folder.checkpoints(), default=0)
    validated = [each["step"] for each in records if each["split"] == "validation"]
    if done >= steps and validated[-1:] == [steps]:
        last = next(each for each in reversed(records) if each["split"] == "validation")
        if last.get("loss") is None:
            return RunState("diverged", "its validation loss is not a number", records)
        return RunState("finished", "", records)
    allowed = run.config.safeguards.max_skipped_steps
    latest = [each for each in records if each["split"] == "train"][-allowed:] if allowed else []
    if len(latest) == allowed > 0 and all(each.get("skipped") for each in latest):
        step = latest[-1]["step"]
        return RunState("diverged", f"loss or gradient was not finite for {allowed} steps before step {step}", records)
    failure = run.folder / FAILURE_FILE
    if failure.is_file():
        lines = failure.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return RunState("failed", lines[-1] if lines else "it ended without a word", records)
    if records or done:
        reached = max([done, *(each["step"] for each in records[-1:])])
        return RunState("unfinished", f"it has reached step {reached} of {steps}", records)
    return RunState("missing", "it has not begun", records)


def _without_places(run: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration, with the names of local files for their paths."""
    data = dict(run.get("data", {}))
    for key in ("sources", "validation"):
        sources = data.get(key) or []
        data[key] = [source | {"paths": [Path(path).name for path in source.get("paths", ())]} for source in sources]
    return run | {"data": data}
