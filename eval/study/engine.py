"""The study engine: the runs that a study needs, the state of each, and their training.

A study plans its runs and lists at any time those needed so far. `train` starts the ones that are not over and repeats
this whenever one ends. Stopped and started again, it reuses finished runs, continues unfinished ones and restarts
failed ones. A run's state is read from its folder alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.study.jobs import Job, Outcome, run_jobs
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.same_run import FREE_TO_CHANGE, differing_fields
from xlstm_lm.training.run_config import RunConfig, as_dict, as_recipe, with_defaults

FAILURE_FILE = "failure.txt"
"""In a run's folder: the end of its output, where its last session failed."""


@dataclass(frozen=True)
class PlannedRun:
    """A training run that a study may need."""

    model: str
    """Name of the model in the study."""
    config: RunConfig
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of the fields that the study varies, by dotted name, where its results show them."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.training.folder

    @property
    def name(self) -> str:
        """Name of the folder, such as mamba2-1m-lr0.004-seed0."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """File with everything that the run's processes print."""
        return self.folder / "output.log"

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""
        return self.config.optimizer.learning_rate

    @property
    def seed(self) -> int:
        """Seed of weights and data order."""
        return self.config.training.seed

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        data = self.config.data
        return self.config.training.steps * data.global_batch_size * data.context_length


@dataclass(frozen=True)
class RunState:
    """Progress of a run."""

    status: str
    """finished, unfinished, diverged, failed or missing."""
    problem: str
    """Why it is not finished, in a sentence."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    reached: int
    """Last step with a checkpoint or a line of metrics.jsonl; 0 of a run that has not begun."""

    @property
    def is_over(self) -> bool:
        """Whether more training would change nothing."""
        return self.status in ("finished", "diverged")

    @property
    def last_validation(self) -> dict[str, Any]:
        """The newest record of held-out data; empty where there is none."""
        return next((each for each in reversed(self.records) if each["split"] == "validation"), {})

    @property
    def validation(self) -> float:
        """Bits per byte, or nats a token where the tokens are no text, of the last validation; infinite if diverged."""
        last = self.last_validation
        value = last.get("loss") if last.get("bits_per_byte") is None else last["bits_per_byte"]
        return math.inf if value is None or self.status == "diverged" else value


def examine(run: PlannedRun) -> RunState:
    """The progress of a run.

    Raises:
        ValueError: its metrics.jsonl is damaged.
    """
    folder = RunFolder(run.folder)
    records, steps, done = folder.metrics(), run.config.training.steps, max(folder.checkpoints(), default=0)
    reached = max([done, *(each["step"] for each in records[-1:])])

    def state(status: str, problem: str = "") -> RunState:
        return RunState(status, problem, records, reached)

    validated = [each for each in records if each["split"] == "validation"][-1:]
    is_validated = bool(run.config.data.validation or run.config.data.task)
    if done >= steps and (not is_validated or [each["step"] for each in validated] == [steps]):
        if is_validated and validated[0].get("loss") is None:
            return state("diverged", "its validation loss is not a number")
        return state("finished")
    allowed = run.config.safeguards.max_skipped_steps
    latest = [each for each in records if each["split"] == "train"][-allowed:] if allowed else []
    # A step that was skipped as an outlier has a finite norm.
    if len(latest) == allowed > 0 and all(each.get("skipped") and each.get("grad_norm") is None for each in latest):
        step = latest[-1]["step"]
        return state("diverged", f"loss or gradient was not finite for {allowed} steps before step {step}")
    failure = run.folder / FAILURE_FILE
    if failure.is_file():
        lines = failure.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return state("failed", lines[-1] if lines else "it ended without a word")
    if reached:
        return state("unfinished", f"it has reached step {reached} of {steps}")
    return state("missing", "it has not begun")


@dataclass(frozen=True)
class Grid:
    """The runs of one model over learning rates and seeds: each rate with the first seed, the others at the best."""

    runs: list[PlannedRun]
    """All combinations; the first is of the first seed."""

    @property
    def tuning(self) -> list[PlannedRun]:
        """One run for each learning rate, of the first seed."""
        return [run for run in self.runs if run.seed == self.runs[0].seed]

    @property
    def best(self) -> float | None:
        """The learning rate with the lowest validation loss, of equal ones the lowest; None until all runs of the first
        seed are over, or where all diverged."""
        states = {run.learning_rate: examine(run) for run in self.tuning}
        if not all(state.is_over for state in states.values()):
            return None
        rate = min(states, key=lambda rate: (states[rate].validation, rate))
        return rate if math.isfinite(states[rate].validation) else None

    @property
    def final(self) -> list[PlannedRun]:
        """One run for each seed at the best learning rate; none until that is known."""
        best = self.best
        return [run for run in self.runs if run.learning_rate == best]

    @property
    def needed(self) -> list[PlannedRun]:
        """All runs that are known to be needed."""
        return list({run.name: run for run in self.tuning + self.final}.values())


def check_folders(runs: Iterable[PlannedRun], study: Path, remedy: str, free: tuple[str, ...] = FREE_TO_CHANGE) -> None:
    """Refuse to continue where runs of another configuration have begun.

    Args:
        runs: those of the study.
        study: its file.
        remedy: the flag that names another folder, or another way out.
        free: fields in which an existing run may differ.

    Raises:
        ValueError: names each run and each field that differs.
    """
    different = []
    for run in runs:
        recorded = RunFolder(run.folder)
        if examine(run).reached and recorded.config_path.is_file():
            there = with_defaults(run.config, recorded.config())
            fields = differing_fields(_without_places(there), _without_places(as_dict(run.config)), free)
            folder = run.folder.parent
            different += [f"{run.name}:", *fields] if fields else []
    if different:
        raise ValueError(
            f"{folder} holds runs of another configuration than {study} describes:\n"
            + "\n".join(different)
            + f"\nSet these fields back, take those folders away, or choose another {remedy}."
        )


def _without_places(run: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration, with the names of local files for their paths."""
    data = dict(run.get("data", {}))
    for key in ("sources", "validation"):
        sources = data.get(key) or []
        data[key] = [source | {"paths": [Path(path).name for path in source.get("paths", ())]} for source in sources]
    return run | {"data": data}


def left(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The runs that more training would change."""
    return [run for run in runs if not examine(run).is_over]


def train(
    needed: Callable[[], Iterable[PlannedRun]],
    command: Sequence[str],
    at_once: int,
    max_seconds: float | None = None,
) -> dict[str, Outcome]:
    """Train until all needed runs are over, a user stops it, or the time is up; return the outcome of each job.

    Args:
        needed: gives the runs that are known to be needed, in the order in which they are trained.
        command: starts one run, with the path of its recipe behind.
        at_once: runs at a time.
        max_seconds: for all; None for no limit.
    """
    begun: dict[str, PlannedRun] = {}

    def jobs() -> list[Job]:
        found = [run for run in left(needed()) if run.name not in begun]
        begun.update({run.name: run for run in found})
        return [_job(run, command) for run in found]

    def then(outcome: Outcome) -> list[Job]:
        if outcome.code and not outcome.asked_to_stop:
            failure = begun[outcome.name].folder / FAILURE_FILE
            failure.write_text(outcome.last_lines + "\n", encoding="utf-8")
        return jobs()

    return run_jobs(jobs(), at_once, then=then, max_seconds=max_seconds)


def _job(run: PlannedRun, command: Sequence[str]) -> Job:
    run.folder.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run.folder)
    folder.write_config(as_recipe(run.config))  # of a run that has begun, `check_folders` found it the same
    (run.folder / FAILURE_FILE).unlink(missing_ok=True)
    return Job(name=run.name, command=[*command, str(folder.config_path)], log=run.log)
