"""Collect loss points from the run folders of designs and of single runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path

from eval.scaling_laws.designed import DESIGN, Design, DesignedRun, read_design
from eval.scaling_laws.planned import planned_point
from eval.scaling_laws.points import CHECK, LossPoint, check_points, read_points, repeated
from eval.study.engine import PlannedRun, RunState, examine
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.run_config import RunConfig, load_run_config


def collect(sources: Iterable[Path]) -> tuple[list[LossPoint], list[str]]:
    """Collect the points of designs, run folders and tables.

    Returns:
        the points, with the spread over seeds where several were trained, those of diverged runs with that status, and
            a sentence for each run without a result yet.

    Raises:
        ValueError: a source is none of the three, or points contradict each other.
    """
    points: list[LossPoint] = []
    missing: list[str] = []
    for source in sources:
        if (source / DESIGN).is_file():
            design = read_design(source)
            for run in design.runs:
                if run.kind != "trunk":
                    _add(design.run_folder(run.run), design, run, points, missing)
        elif RunFolder(source).config_path.is_file():
            _add(source, None, None, points, missing)
        elif source.is_file():
            table = read_points(source, configured_flops)
            points += table.points + table.checks
        else:
            raise ValueError(
                f"{source} is no design, run folder or table: give a folder of design, a run, or a CSV file."
            )
    check_points([point for point in points if point.status != CHECK], "What was collected")
    return _with_spread(points), missing


def _with_spread(points: list[LossPoint]) -> list[LossPoint]:
    """Fill in loss_std of finished points that differ in the seed alone."""
    spread = {
        id(point): statistics.stdev(each.loss for each in group)
        for group in repeated(point for point in points if point.status == "finished")
        for point in group
    }
    return [dataclasses.replace(point, loss_std=spread.get(id(point), point.loss_std)) for point in points]


def configured_flops(point: LossPoint) -> float | None:
    """FLOPs of a point by the configuration in its run folder; None where that is not there."""
    if not point.source or not RunFolder(point.source).config_path.is_file():
        return None
    config = load_run_config([RunFolder(point.source).config_path])
    return training_flops_per_token(config.model, config.data.context_length) * point.tokens


def _add(
    folder: Path, design: Design | None, run: DesignedRun | None, points: list[LossPoint], missing: list[str]
) -> None:
    path = RunFolder(folder).config_path
    if not path.is_file():
        missing.append(f"{folder.name} has not begun.")
        return
    config = load_run_config([path])
    state = examine(PlannedRun("", config))
    if not state.is_over:
        missing.append(f"{folder.name} is {state.status}: {state.problem}.")
        return
    points.append(_point(folder, config, state, run))


def _point(folder: Path, config: RunConfig, state: RunState, run: DesignedRun | None) -> LossPoint:
    last = state.last_validation
    diverged = state.status == "diverged"
    sessions = RunFolder(folder).environment()
    planned = planned_point(config)
    return dataclasses.replace(
        planned,
        run=folder.name,
        trunk=run.trunk if run else folder.name,
        architecture=run.architecture if run else planned.architecture,
        loss=float("nan") if diverged else last["loss"],
        bits_per_byte=last.get("bits_per_byte"),
        status="diverged" if diverged else CHECK if run and run.kind == "check" else "finished",
        git=str((sessions[-1] if sessions else {}).get("git_commit") or ""),
        source=str(folder),
    )
