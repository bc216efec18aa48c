"""The study engine: the state that it reads from a run's folder, and the runs that it needs next."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from eval.study.engine import FAILURE_FILE, Grid, PlannedRun, check_folders, examine, left
from xlstm_lm.training.run_config import as_recipe, load_run_config

TEXT = {"kind": "text", "paths": ["text.txt"]}


def plan(folder: Path, rate: float = 0.1, seed: int = 0, **data) -> PlannedRun:
    """A run of four steps."""
    values = {
        "model": {"family": "lstm", "vocab_size": 257, "embedding_dim": 8, "num_blocks": 1},
        "data": {"context_length": 8, "global_batch_size": 2, "sources": [TEXT], "validation": [TEXT], **data},
        "training": {"steps": 4, "seed": seed, "run_dir": str(folder / f"lr{rate:g}-seed{seed}")},
        "optimizer": {"learning_rate": rate},
        "schedule": {"warmup_steps": 1},
        "safeguards": {"max_skipped_steps": 2},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return PlannedRun("lstm", load_run_config([path]))


def lay(run: PlannedRun, *records: dict, checkpoint: int | None = None) -> PlannedRun:
    """Write a run's folder."""
    run.folder.mkdir(exist_ok=True)
    (run.folder / "config.yaml").write_text(as_recipe(run.config))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if checkpoint is not None:
        (run.folder / "checkpoints" / f"step_{checkpoint:08}").mkdir(parents=True)
    return run


def train(step: int, **more) -> dict:
    return {"split": "train", "step": step, "tokens": 16 * step, "elapsed_seconds": 1.0} | more


def validation(step: int, loss: float | None, bits: float | None = None) -> dict:
    return train(step, split="validation", loss=loss, bits_per_byte=bits)


def finish(run: PlannedRun, loss: float | None, bits: float | None = None) -> PlannedRun:
    return lay(run, train(4), validation(4, loss, bits), checkpoint=4)


def test_a_run_that_has_not_begun_is_missing(tmp_path):
    state = examine(plan(tmp_path))
    assert (state.status, state.reached, state.is_over) == ("missing", 0, False)


def test_a_run_is_finished_when_its_last_step_is_saved_and_validated(tmp_path):
    state = examine(finish(plan(tmp_path), 2.0))
    assert (state.status, state.reached, state.validation) == ("finished", 4, 2.0) and state.is_over
    assert examine(finish(plan(tmp_path, seed=1), 2.0, bits=1.5)).validation == 1.5
    early = examine(lay(plan(tmp_path, seed=2), train(2), validation(2, 2.0), checkpoint=4))
    assert early.status == "unfinished" and "step 4 of 4" in early.problem
    unsaved = examine(lay(plan(tmp_path, seed=3), train(4), validation(4, 2.0), checkpoint=3))
    assert unsaved.status == "unfinished"


def test_a_run_without_held_out_data_is_finished_with_its_last_checkpoint(tmp_path):
    run = lay(plan(tmp_path, validation=[]), train(4), checkpoint=4)
    assert examine(run).status == "finished"


def test_a_run_diverges_by_its_loss_or_by_skipping(tmp_path):
    assert examine(finish(plan(tmp_path), None)).status == "diverged"
    skipped = [train(step, skipped=True) for step in (1, 2)]
    state = examine(lay(plan(tmp_path, seed=1), *skipped))
    assert state.status == "diverged" and state.is_over and state.validation == float("inf")
    assert state.problem == "loss or gradient was not finite for 2 steps before step 2"
    assert examine(lay(plan(tmp_path, seed=2), train(1), skipped[1])).status == "unfinished"
    outliers = [{**each, "grad_norm": 9.0} for each in skipped]
    assert examine(lay(plan(tmp_path, seed=3), *outliers)).status == "unfinished"


def test_a_failure_is_told_by_its_last_line(tmp_path):
    run = lay(plan(tmp_path), train(1))
    (run.folder / FAILURE_FILE).write_text("a traceback\nValueError: it was too warm\n")
    state = examine(run)
    assert (state.status, state.problem, state.is_over) == ("failed", "ValueError: it was too warm", False)


def grid(folder: Path) -> Grid:
    return Grid([plan(folder, rate, seed) for rate, seed in itertools.product((0.3, 0.1, 0.2), (5, 6, 7))])


def test_other_seeds_are_needed_at_the_best_rate_alone(tmp_path):
    runs = grid(tmp_path)
    first = ["lr0.3-seed5", "lr0.1-seed5", "lr0.2-seed5"]
    assert [run.name for run in runs.needed] == first and runs.best is None and runs.final == []
    for run, loss in zip(runs.tuning, (2.0, 1.5, 1.5), strict=True):
        assert runs.best is None
        finish(run, loss)
    assert runs.best == 0.1, "of equal losses the lower rate"
    assert [run.name for run in runs.final] == ["lr0.1-seed5", "lr0.1-seed6", "lr0.1-seed7"]
    assert [run.name for run in runs.needed] == [*first, "lr0.1-seed6", "lr0.1-seed7"]
    assert [run.name for run in left(runs.needed)] == ["lr0.1-seed6", "lr0.1-seed7"]


def test_a_diverged_rate_is_not_the_best_and_none_is_where_all_diverged(tmp_path):
    runs = grid(tmp_path)
    for run in runs.tuning:
        finish(run, None)
    assert runs.best is None and len(runs.needed) == 3 and left(runs.needed) == []
    finish_again = runs.tuning[0]
    (finish_again.folder / "metrics.jsonl").write_text(json.dumps(validation(4, 9.0)) + "\n")
    assert runs.best == 0.3


def test_a_run_with_another_configuration_is_refused_once_it_has_begun(tmp_path):
    there = lay(plan(tmp_path))
    asked = PlannedRun("lstm", plan(tmp_path, context_length=16).config)
    check_folders([asked], Path("study.yaml"), "--runs")  # nothing was computed yet
    lay(there, train(1))
    with pytest.raises(
        ValueError, match=r"than study.yaml describes:\nlr0.1-seed0:\n  data.context_length: 8 there, 16"
    ):
        check_folders([asked], Path("study.yaml"), "--runs")
    check_folders([asked], Path("study.yaml"), "--runs", free=("data.context_length",))


def test_tokens_are_those_of_the_whole_training(tmp_path):
    assert plan(tmp_path).tokens == 4 * 2 * 8
