"""Test the final runs of a comparison and measure the speed of its models; the results are kept as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.compare.runs import Runs, is_chosen
from eval.compare.tested import as_json
from eval.study.engine import PlannedRun, examine
from eval.study.jobs import Job, Outcome, run_jobs
from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.recipe import to_yaml

SPEEDS = ("training", "generation")


def test_file(runs: Runs, run: PlannedRun) -> Path:
    """The file with the test of a finished run; its name changes with the steps and the settings of the test."""
    assert runs.comparison.config.test
    # The location of the data is no part of the measurement: the paths are those of the configuration.
    settings = asdict(runs.comparison.config.test)
    return run.folder / f"test-step{run.config.training.steps}-{_digest(settings)}.json"


def speed_file(runs: Runs, kind: str) -> Path:
    """The file with the speeds of all models, in training or in generation."""
    assert runs.comparison.config.speed
    settings = [asdict(runs.comparison.config.speed), {model.name: model.section for model in runs.models}]
    return runs.out / "speed" / f"{kind}-{_digest(settings)}.json"


def to_test(runs: Runs, only: Sequence[str]) -> list[PlannedRun]:
    """The final runs that are finished and not tested."""
    if runs.comparison.config.test is None:
        return []
    final = [run for grid in runs.grids.values() for run in grid.final if is_chosen(run, only)]
    return [run for run in final if examine(run).status == "finished" and not test_file(runs, run).is_file()]


def speeds_left(runs: Runs) -> list[str]:
    """The kinds of speed that are asked for and not measured."""
    speed = runs.comparison.config.speed
    asked = [] if speed is None else [kind for kind in SPEEDS if kind == "training" or speed.prompts]
    return [kind for kind in asked if not speed_file(runs, kind).is_file()]


def measure_all(runs: Runs, only: Sequence[str], *, at_once: int, max_seconds: float | None) -> dict[str, Outcome]:
    """Run the remaining tests, several at once; then measure speed, with nothing else running."""
    begin = time.monotonic()
    tests = [_test_job(runs, run) for run in to_test(runs, only)]
    outcomes = run_jobs(tests, at_once, max_seconds=max_seconds)
    if any(outcome.asked_to_stop for outcome in outcomes.values()):
        return outcomes
    left = None if max_seconds is None else max_seconds - (time.monotonic() - begin)
    kinds = {f"{kind} speed": kind for kind in speeds_left(runs)}
    jobs = [_speed_job(runs, name, kind) for name, kind in kinds.items()]

    def then(outcome: Outcome) -> Sequence[Job]:
        if outcome.code == 0:
            kind = kinds[outcome.name]
            _unfinished(runs, kind).rename(speed_file(runs, kind))
        return ()

    return outcomes | run_jobs(jobs, 1, then=then, max_seconds=left)


def _test_job(runs: Runs, run: PlannedRun) -> Job:
    test = runs.comparison.config.test
    assert test
    test = dataclasses.replace(test, documents=runs.comparison.test_documents())
    command = [sys.executable, "-m", "eval.compare.tested", "--run", str(run.folder)]
    command += ["--test", as_json(test), "--out", str(test_file(runs, run))]
    return Job(name=f"test of {run.name}", command=command, log=run.log)


def _speed_job(runs: Runs, name: str, kind: str) -> Job:
    speed = runs.comparison.config.speed
    assert speed
    models = []
    for model in runs.models:
        path = runs.out / "models" / f"{model.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, to_yaml({"model": model.section}).encode())
        models.append(f"{model.name}={path}")
    out = _unfinished(runs, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "eval.throughput", "--models", *models, "--out", str(out)]
    command += ["--rounds", str(speed.rounds), "--seconds", str(speed.seconds)]
    if kind == "generation":
        command += ["--generate", "--new-tokens", str(speed.new_tokens)]
        command += ["--lengths", *map(str, speed.prompts), "--batch-sizes", *map(str, speed.batch_sizes)]
    else:
        command += ["--lengths", *map(str, speed.lengths), "--tokens", str(speed.tokens)]
        command += ["--modes", *speed.modes]
    return Job(name=name, command=command, log=runs.out / "speed" / "output.log")


def _unfinished(runs: Runs, kind: str) -> Path:
    """The file that `eval.throughput` updates after every table, until it is done."""
    return runs.out / "speed" / f"{kind}-unfinished.json"


def _digest(settings: Any) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
