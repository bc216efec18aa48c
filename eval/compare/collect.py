"""Collect the results of a comparison so far from its run folders and measurements."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict
from typing import Any

import yaml

from eval.bench.measure import environment
from eval.compare.config import Comparison, Model
from eval.compare.measure import SPEEDS, speed_file, speeds_left, test_file
from eval.compare.results import CurvePoint, ModelResult, Results, Run
from eval.compare.runs import Runs
from eval.compare.tested import MEASURE_AGAIN, read_tested
from eval.scoring.models import pick_device
from eval.study.engine import PlannedRun, examine
from xlstm_lm.base.read_files import read_json
from xlstm_lm.data.fingerprint import fingerprint_differences
from xlstm_lm.models.accounting import count_parameters, state_bytes, training_flops_per_token
from xlstm_lm.runs.checkpoint import data_fingerprint
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.run_config import as_dict

STATE_DOUBLINGS = 5
"""States are counted at 1, 2, 4, ... times the training context, this many times."""


def collect(runs: Runs) -> Results:
    """All results so far; those still missing are listed in `missing`.

    Raises:
        ValueError: two runs of a seed have not read the same tokens in the same order.
    """
    comparison = runs.comparison
    config = comparison.config
    missing: list[str] = []
    notes = [_same_tokens(runs)]
    models = [_model_result(runs, model, missing, notes) for model in runs.models]
    notes.append(_ways_of_testing(models))
    speeds = {kind: _speed(runs, kind, missing) for kind in SPEEDS}
    first = runs.grids[runs.models[0].name].runs[0]
    for result, model in zip(models, runs.models, strict=True):
        if any(row["name"] == model.name for speed in speeds.values() for row in speed.get("rows", ())):
            result.speed_name = model.name
    return Results(
        name=config.name,
        title=config.title,
        question=config.question,
        data=config.data,
        context_length=first.config.data.context_length,
        config=yaml.safe_dump({"compare": asdict(config)}, sort_keys=False, allow_unicode=True),
        recipe=_shared_recipe(first),
        environment=environment(pick_device(None).type),
        command=shlex.join([*command(comparison, runs), "--stage", "report"]),
        models=models,
        training_speed=speeds["training"].get("rows", []),
        generation_speed=speeds["generation"].get("rows", []),
        speed_environments={kind: speed["environment"] for kind, speed in speeds.items() if speed},
        scaling=comparison.scaling,
        published=config.published,
        missing=missing,
        notes=[note for note in notes if note],
    )


def command(comparison: Comparison, runs: Runs) -> list[str]:
    """The command that continues a comparison."""
    return ["python", "-m", "eval.compare", "--config", str(comparison.path), "--out", str(runs.out)]


def _model_result(runs: Runs, model: Model, missing: list[str], notes: list[str]) -> ModelResult:
    """The results of a model's runs; remarks about them are added to `missing` and `notes`."""
    grid = runs.grids[model.name]
    tried, best = grid.tuning, grid.best
    context, section = tried[0].config.data.context_length, tried[0].config.model
    name = f"{model.label} at {model.size}"
    for run in grid.needed:
        state = examine(run)
        if state.status not in ("finished", "diverged"):
            missing.append(f"{run.name} is {state.status}: {state.problem}.")
        if state.status == "diverged":
            notes.append(f"{run.name} diverged: {state.problem}.")
    if best is None:
        over = all(examine(run).is_over for run in tried)
        reason = "all of them diverged" if over else "not all of the grid are there"
        missing.append(f"{name}: the best learning rate is not known, for {reason}; so it has no final runs.")
    elif len(tried) > 1 and best in (model.learning_rates[0], model.learning_rates[-1]):
        end = "lowest" if best == model.learning_rates[0] else "highest"
        notes.append(f"{name}: the best learning rate, {best:g}, is the {end} of its grid; a wider one may do better.")
    results = [_run_result(runs, run, section, is_final=True) for run in grid.final]
    if runs.comparison.config.test:
        untested = [run.name for run in results if run.status == "finished" and run.tested is None]
        missing += [f"{run} is not tested on the test documents." for run in untested]
    lengths = [context << power for power in range(STATE_DOUBLINGS + 1)]
    return ModelResult(
        architecture=model.architecture,
        label=model.label,
        size=model.size,
        parameters=count_parameters(section),
        flops_per_token=training_flops_per_token(section, context),
        state_bytes=[(length, state_bytes(section, context_length=length)) for length in lengths],
        recipe=yaml.safe_dump(as_dict(tried[0].config)["model"], sort_keys=False),
        tried=[_run_result(runs, run, section, is_final=False) for run in tried],
        learning_rate=best,
        runs=results,
    )


def _run_result(runs: Runs, run: PlannedRun, section: Any, is_final: bool) -> Run:
    state = examine(run)
    flops = training_flops_per_token(section, run.config.data.context_length)
    trained = [each for each in state.records if each["split"] == "train"]
    measured = [each for each in state.records if each["split"] != "event"]
    last = measured[-1] if measured else {"step": 0, "tokens": 0, "elapsed_seconds": 0.0}
    speeds = [each["tokens_per_second"] for each in trained[1:]]  # the first includes one-time work
    tested = None
    if is_final and runs.comparison.config.test and state.status == "finished":
        path = test_file(runs, run)
        tested = read_tested(path) if path.is_file() else None
    sessions = RunFolder(run.folder).environment()
    return Run(
        name=run.name,
        seed=run.seed,
        learning_rate=run.learning_rate,
        status=state.status,
        problem=state.problem,
        steps=last["step"],
        tokens=last["tokens"],
        seconds=last["elapsed_seconds"],
        tokens_per_second=statistics.median(speeds) if speeds else None,
        curve=[
            CurvePoint(
                flops=each["tokens"] * flops,
                seconds=each["elapsed_seconds"],
                **{name: each[name] for name in ("step", "tokens", "loss", "bits_per_byte", "perplexity")},
            )
            for each in state.records
            if each["split"] == "validation" and each["loss"] is not None
        ],
        tested=tested,
        environment=sessions[-1] if sessions else {},
    )


def _ways_of_testing(models: list[ModelResult]) -> str:
    """A note on which models were tested in which way, where there are several ways; otherwise ""."""
    ways: dict[str, list[str]] = {}
    for model in models:
        if model.runs and (tested := model.runs[0].tested):
            ways.setdefault(tested.how, []).append(f"{model.label} at {model.size}")
    if len(ways) < 2:
        return ""
    listed = "; ".join(f"{', '.join(names)}: {how}" for how, names in ways.items())
    return (
        f"The test documents were read in different ways ({listed}). A state carried along sees the whole document so "
        "far; at equal contexts all models stand in the table of context lengths, which begins with that of training."
    )


def _same_tokens(runs: Runs) -> str:
    """A note that the checkpoints' data fingerprints agree for all runs of a size and seed; "" without checkpoints.

    Raises:
        ValueError: they differ.
    """
    groups: dict[tuple[str, int], list[tuple[dict[str, Any], list[str]]]] = {}
    count = 0
    sizes = {model.name: model.size for model in runs.models}
    for run in runs.needed:
        folder = next(iter(RunFolder(run.folder).checkpoints().values()), None)
        if folder is None:
            continue
        fingerprint = data_fingerprint(folder)
        group = groups.setdefault((sizes[run.model], run.seed), [])
        same = next((names for other, names in group if not fingerprint_differences(other, fingerprint)), None)
        if same is None:
            group.append((fingerprint, same := []))
        same.append(run.name)
        count += 1
    for (size, seed), group in groups.items():
        if len(group) > 1:
            (_, one), (_, other) = group[:2]
            raise ValueError(
                f"Runs of size {size} and seed {seed} have not read the same tokens in the same order, so they cannot "
                f"be compared: {', '.join(one)} and {', '.join(other)}. Train one side again, on the data of the other."
            )
    if not count:
        return ""
    return (
        f"Same tokens in the same order: the data fingerprints (files, tokenizer, row length, batch, shuffle, seed) of "
        f"the {count} runs with a checkpoint are equal within each size and seed."
    )


def _speed(runs: Runs, kind: str, missing: list[str]) -> dict[str, Any]:
    speed = runs.comparison.config.speed
    if speed is None or (kind == "generation" and not speed.prompts):
        return {}
    if kind in speeds_left(runs):
        missing.append(f"The speed of {kind} is not measured.")
        return {}
    return read_json(speed_file(runs, kind), {"rows": list, "environment": dict}, MEASURE_AGAIN)


def _shared_recipe(run: PlannedRun) -> str:
    """A run's configuration without the fields that differ between runs."""
    values = as_dict(run.config)
    del values["model"], values["training"]["run_dir"], values["training"]["seed"], values["optimizer"]["learning_rate"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
