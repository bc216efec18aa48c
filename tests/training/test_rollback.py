"""A run that went back from outliers is the run that never saw their documents."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.equivalence import batches, build_engine, engine_step
from tests.training.layouts import save
from tests.training.processes import run_ranks
from tests.training.runs import configure, records
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.data import TrainingStream
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.runs import overview
from xlstm_lm.runs.checkpoint import read_checkpoint
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.loop import train
from xlstm_lm.training.report import Report
from xlstm_lm.training.rollback import SpikeGuard, return_to_good_checkpoint
from xlstm_lm.training.run_config import RunConfig

LANES, CONTEXT, STEPS = 4, 16, 40
SPOILED_ROW = 28
"""Row of the lanes 1 and 2 in which documents begin that no other text resembles."""
GUARD = {
    "safeguards.spike_threshold": 15.0,
    "safeguards.spike_window": 16,
    "safeguards.spike_patience": 1,
}


def write_lanes(folder: Path, without: set[str] = frozenset()) -> None:
    """Write a file for each lane, without the documents named; two files have outliers, of 5 rows and more."""
    folder.mkdir()
    generator = random.Random(0)
    words = ["aaaa", "bbbb"]
    for lane in range(LANES):
        lines, size = [], 0
        while size < 3 * STEPS * CONTEXT:
            line = " ".join(generator.choices(words, k=generator.randint(1, 3)))
            if lane in (1, 2) and size > SPOILED_ROW * CONTEXT > size - 30:
                line = "".join(generator.choices("0123456789!?#$%&QXZJKVW", k=100))
            lines.append(line)
            size += len(line) + 1
        path = folder / f"{lane}.txt"
        kept = [line for number, line in enumerate(lines, 1) if f"{path.name}:{number}" not in without]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def configuration(folder: Path, **overrides: Any) -> dict[str, Any]:
    source = {"kind": "text_lines", "paths": [str(folder / "data" / "*.txt")]}
    return {
        "data.sources": [source],
        "data.validation": [],
        "data.shuffle": False,
        "data.global_batch_size": LANES,
        "training.steps": STEPS,
        "training.checkpoint_every": 8,
        "training.gate_statistics_every": 0,
        "model.pattern": ["mlstm"],
        "model.num_blocks": 1,
        "optimizer.learning_rate": 0.05,
        **GUARD,
    } | {name.replace("__", "."): value for name, value in overrides.items()}


def spoiled(folder: Path, **overrides: Any) -> RunConfig:
    if not folder.exists():
        folder.mkdir()
        write_lanes(folder / "data")
    return configure(folder, **configuration(folder, **overrides))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in records(folder / "run") if each["split"] == "event" and each["event"] == kind]


def everything(folder: Path) -> list[dict[str, Any]]:
    """All records, with documents as named within the folder."""
    return json.loads(json.dumps(records(folder / "run")).replace(str(folder), ""))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [each for each in records(folder / "run") if each["split"] == "train"]


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint."""
    checkpoint = read_checkpoint(next(iter(checkpoint_folders(folder / "run").values())))
    assert checkpoint.state["step"] == STEPS
    moments = checkpoint.moments(list(checkpoint.forms("optimizer")))
    return checkpoint.all_weights() | dict(moments)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory):
    """A run that has gone back, in this process."""
    folder = tmp_path_factory.mktemp("runs") / "gone_back"
    train(spoiled(folder))
    return folder


def test_a_run_goes_back_and_equals_one_that_never_saw_the_documents(gone_back, tmp_path):
    [event] = events(gone_back, "went back")
    assert (event["step"], event["from_step"]) == (24, 30)
    names = {Path(each).name for each in event["documents"]}
    spoiling = {name for name in names if name.startswith(("1.txt", "2.txt"))}
    assert spoiling and names > spoiling
    never = tmp_path / "never"
    never.mkdir()
    write_lanes(never / "data", names)
    train(configure(never, **configuration(never)))
    assert not events(never, "went back") and not events(never, "skipped")
    assert differing(last_state(gone_back), last_state(never)) == []
    assert steps_of(gone_back) == steps_of(never)


class KilledError(Exception):
    """The end of a process, as far as a test in this one can bring it about."""


def stop_in_batch(monkeypatch, number: int) -> None:
    """Have the run receive SIGTERM while it reads a batch (from 1)."""
    calls = 0
    next_batch = TrainingStream.next_batch

    def stopping(stream: TrainingStream) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(stream)

    monkeypatch.setattr(TrainingStream, "next_batch", stopping)


@pytest.mark.parametrize("batch", [29, 33], ids=["amid outliers", "after the return"])
def test_a_run_that_is_stopped_and_resumed_decides_as_an_undisturbed_one(batch, gone_back, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        stop_in_batch(patched, batch)
        with pytest.raises(SystemExit):
            train(spoiled(folder, training__keep_checkpoints=1))
    newest = next(iter(checkpoint_folders(folder / "run")))
    assert newest == (29 if batch == 29 else 27)
    train(spoiled(folder))
    assert differing(last_state(folder), last_state(gone_back)) == []
    assert everything(folder) == everything(gone_back)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["go_back", "sync"], ids=["before metrics are cut", "before the checkpoint is saved"])
def test_a_run_that_is_killed_while_it_goes_back_does_so_again(where, gone_back, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    going = False

    def mark(*_: Any) -> None:
        nonlocal going
        going = True

    original = getattr(Report, where)

    def dying(report: Report, *arguments: Any) -> None:
        if going:
            raise KilledError
        original(report, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SpikeGuard, "check_limit", mark)
        patched.setattr(Report, where, dying)
        with pytest.raises(KilledError):
            train(spoiled(folder))
    assert next(iter(checkpoint_folders(folder / "run"))) == 24
    train(spoiled(folder))
    assert differing(last_state(folder), last_state(gone_back)) == []
    assert everything(folder) == everything(gone_back)


def test_events_name_the_documents_and_lead_into_the_series_of_steps(gone_back):
    assert [each["step"] for each in steps_of(gone_back)] == list(range(1, STEPS + 1))
    superseded = [json.loads(line) for line in (gone_back / "run" / "superseded.jsonl").read_text().splitlines()]
    skipped = [each for each in superseded if each["split"] == "event"]
    assert [each["step"] for each in superseded if each["split"] == "train"] == [25, 26, 27, 28, 29]
    [event] = skipped
    assert (event["step"], event["event"]) == (29, "skipped")
    assert re.match(
        r"Step 29 skipped: its loss \S+ is \S+ deviations above the median \S+ of 16 steps", event["message"]
    )
    [returned] = events(gone_back, "went back")
    assert set(event["documents"]) < set(returned["documents"])
    assert f"The {len(returned['documents'])} documents" in returned["message"]
    page = overview.page(overview.look_at(gone_back / "run"))
    assert "event       step 24: Loss or gradient norm" in page and "went back from step 30 to step 24" in page
    assert json.loads((gone_back / "run" / "status.json").read_text())["step"] == STEPS


def poison(monkeypatch, steps: range) -> None:
    """Have the gradients of the given calls of the engine (from 1) be NaN."""
    train_step = TrainingEngine.train_step
    calls = 0

    def poisoned(engine: TrainingEngine, micro_batches: Any, scale: Any, *rest: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return train_step(engine, micro_batches, math.nan if calls in steps else scale, *rest, **named)

    monkeypatch.setattr(TrainingEngine, "train_step", poisoned)


def short(folder: Path, **overrides: Any) -> RunConfig:
    return spoiled(folder, training__steps=8, training__checkpoint_every=2, **overrides)


def test_steps_that_are_not_finite_go_back_as_well_and_stay_out_of_the_history(tmp_path, monkeypatch):
    """One is skipped; two in a row send the run back, past their documents."""
    with monkeypatch.context() as patched:
        poison(patched, [2, 5, 6])
        train(short(tmp_path / "poisoned"))
    [event] = events(tmp_path / "poisoned", "went back")
    assert (event["step"], event["from_step"]) == (4, 6)
    assert [each["step"] for each in events(tmp_path / "poisoned", "skipped")] == [2]
    newest = next(iter(checkpoint_folders(tmp_path / "poisoned" / "run").values()))
    state = json.loads((newest / "state.json").read_text())
    recent = state["spikes"]["recent"]
    assert [len(values) for values in recent] == [7, 7] and all(map(math.isfinite, recent[0] + recent[1]))
    assert (state["optimizer_steps"], state["skipped_steps"], state["spikes"]["returns"]) == (7, 1, [6])
    assert recent[0] == pytest.approx(
        [each["loss"] for each in steps_of(tmp_path / "poisoned") if not each.get("skipped")]
    )


def test_a_run_that_goes_back_too_often_fails_by_name(tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 100))
    overrides = {"safeguards__spike_rollbacks": 2, "safeguards__spike_patience": 0}
    with pytest.raises(RunError, match=r"Step 5: .*gone back 2 times .* 10,000 steps.*spike_rollbacks(.|\n)*0\.txt:"):
        train(short(tmp_path / "run_of", **overrides))
    assert len(events(tmp_path / "run_of", "went back")) == 2
    monkeypatch.undo()
    poison(monkeypatch, [1])
    with pytest.raises(RunError, match=r"Step 1 and .*no good checkpoint .*training\.checkpoint_every"):
        train(short(tmp_path / "too_early", **overrides))


def test_a_checkpoint_that_is_damaged_or_not_finite_is_no_target(tmp_path, caplog):
    world = join_world()
    _, engine = build_engine(world, 2)
    weights, random_states = {}, {}
    for step in (1, 2, 3, 4):
        engine_step(world, engine, batches()[step - 1], step)
        torch.rand(step)
        save(world, engine, tmp_path, step=step, keep=9)
        random_states[step] = torch.get_rng_state()
        weights[step] = {name: value.clone() for name, value in engine.state.weights()}
    spoiled_weights = dict(weights[4])
    spoiled_weights["up.bias"] = torch.full_like(weights[4]["up.bias"], torch.inf)
    engine.state.load(lambda name, start, stop: spoiled_weights[name].flatten()[start:stop], None, 3)
    save(world, engine, tmp_path, step=3, keep=9)
    next(checkpoint_folders(tmp_path)[2].glob("model*")).write_bytes(b"")
    assert return_to_good_checkpoint(tmp_path, 5, engine, world).state["step"] == 4
    assert list(checkpoint_folders(tmp_path)) == [4, 3, 2, 1]
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        found = return_to_good_checkpoint(tmp_path, 4, engine, world)
    assert found.state["step"] == 1 and engine.optimizer_steps == 1
    assert differing(dict(engine.state.weights()), weights[1]) == []
    assert torch.equal(torch.get_rng_state(), random_states[1]) and not torch.equal(random_states[1], random_states[4])
    assert "step_00000003 holds numbers that are not finite, in up.bias" in caplog.text
    assert "step_00000002" in caplog.text
    assert list(checkpoint_folders(tmp_path)) == [1]
    with pytest.raises(RunError, match="no good checkpoint"):
        return_to_good_checkpoint(tmp_path, 1, engine, world)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"deepspeed": {"zero_optimization": {"stage": 3}}, "training.precision": "bf16", "data.num_workers": 1},
        {
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "training.sequence_parallel": 2,
            "training.carry_state": True,
        },
    ],
    ids=["stage 2", "stage 3, bf16, workers", "divided rows, carried states"],
)
def test_two_ranks_go_back_and_equal_a_run_that_never_saw_the_documents(overrides, tmp_path):
    def run(name: str, without: set[str] = frozenset()) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_lanes(folder / "data", without)
        run_ranks(2, "runs", "train", folder, json.dumps(configuration(folder) | overrides))
        return folder

    gone_back = run("gone_back")
    [event] = events(gone_back, "went back")
    never = run("never", {Path(each).name for each in event["documents"]})
    assert not events(never, "went back")
    assert differing(last_state(gone_back), last_state(never)) == []
    assert steps_of(gone_back) == steps_of(never)
