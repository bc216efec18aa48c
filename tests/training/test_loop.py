"""Whole runs: what they write, and that going on with one gives the run that never stopped."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.training.processes import run_alone, run_ranks
from tests.training.runs import configure, records
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.lease import FolderLease
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.cli.conclusion import conclude
from xlstm_lm.data import TrainingStream, build_tokenizer
from xlstm_lm.runs.heartbeats import Heartbeat, write_heartbeats
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import RunConfig, load_run_config


def comparable(folder: Path, reference: Path) -> None:
    assert records(folder / "run") == records(reference / "run")


def test_a_run_writes_what_it_promises(reference):
    run_dir = reference / "run"
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train_records = [each for each in written if each["split"] == "train"]
    validation = [each for each in written if each["split"] == "validation"]
    assert [each["step"] for each in train_records] == list(range(1, 11))
    assert [each["step"] for each in validation] == [4, 8, 10]
    assert [each["tokens"] for each in train_records] == [4 * 16 * step for step in range(1, 11)]
    assert all(each["elapsed_seconds"] > 0 for each in written)
    # Every target is a byte but for the ends of documents, which stand for none.
    config = configure(reference).data
    stream = TrainingStream(config, build_tokenizer(config.tokenizer), lanes=range(4), seed=0)
    for each in train_records:
        bytes_of_step = (stream.next_batch().targets_BT < 256).sum().item()
        assert each["bits_per_byte"] == pytest.approx(each["loss"] * 4 * 16 / math.log(2) / bytes_of_step)
    assert validation[0]["bits_per_byte"] > validation[0]["loss"] / math.log(2)
    for each in train_records:
        assert each["tokens_per_second"] > 0 and each["memory_bytes"] > 1e6 and each["grad_norm"] > 0
        assert each["parameter_norm"] > 0
        assert ("gates/forget_gate" in each) == (each["step"] % 5 == 0)
    assert train_records[0]["lr"] == 0.005 and train_records[1]["lr"] == 0.01
    for each in validation:
        assert each["perplexity"] == pytest.approx(math.exp(each["loss"]))
    assert train_records[-1]["loss"] < train_records[0]["loss"] - 0.3
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(checkpoint_folders(run_dir)) == [10, 9, 6]
    session = json.loads((run_dir / "environment.json").read_text())["sessions"][0]
    assert session["processes"] == 1 and session["versions"]["torch"] and "git_commit" in session


def test_a_run_goes_on_where_a_checkpoint_stands(folder, reference, capsys):
    """A run that died behind step 6 cuts its later lines and a torn one, then writes them again."""
    train(configure(folder))
    run_dir = folder / "run"
    for step in (9, 10):
        for path in sorted((run_dir / "checkpoints" / f"step_{step:08}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run_dir / "checkpoints" / f"step_{step:08}").rmdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    write_heartbeats(run_dir, "lost_0", [Heartbeat(rank=1, host="lost", pid=1, step=3, phase="step", time=0.0)])
    before = (run_dir / "metrics.jsonl").read_text().splitlines()
    train(configure(folder))
    comparable(folder, reference)
    superseded = (run_dir / "superseded.jsonl").read_text().splitlines()
    assert superseded == before[-len(superseded) :] and '"step": 7,' in superseded[0]
    assert f"{len(superseded)} lines of metrics.jsonl come after step 6" in capsys.readouterr().err
    train(configure(folder))  # nothing left to do
    comparable(folder, reference)
    assert not (run_dir / "lease.json").exists() and not (run_dir / "heartbeats").exists()
    sessions = json.loads((run_dir / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 6, 10]


def test_a_folder_that_another_process_holds_is_refused_before_data_are_opened(folder, monkeypatch):
    monkeypatch.setattr("xlstm_lm.training.trainer.DocumentData", lambda config: pytest.fail("data are opened"))
    held = FolderLease.take(folder / "run")
    with pytest.raises(ValueError, match=r"run: another process is at work there: process \d+ on"):
        train(configure(folder))
    held.release()


def lose_the_folder(monkeypatch, lose) -> None:
    """Have `lose` called while the fifth step begins."""
    batches = 0
    next_batch = TrainingStream.next_batch

    def losing(stream):
        nonlocal batches
        batches += 1
        if batches == 5:
            lose()
        return next_batch(stream)

    monkeypatch.setattr(TrainingStream, "next_batch", losing)


def test_a_run_whose_folder_is_moved_is_saved_there_and_goes_on_by_its_own_recipe(
    folder, reference, monkeypatch, caplog
):
    with monkeypatch.context() as patched:
        lose_the_folder(patched, lambda: (folder / "run").rename(folder / "moved"))
        with pytest.raises(RunError, match=r"was moved to \S*moved while .*Step 5 is saved there"):
            train(configure(folder))
    assert list(checkpoint_folders(folder / "moved")) == [5, 3]
    assert not (folder / "run").exists() and not (folder / "moved" / "lease.json").exists()
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        train(load_run_config([folder / "moved" / "config.yaml"]))
    assert "belongs to the run in" in caplog.text and not (folder / "run").exists()
    assert records(folder / "moved") == records(reference / "run")


def test_a_run_whose_folder_is_deleted_stops_and_writes_no_other(folder, monkeypatch):
    lose_the_folder(monkeypatch, lambda: shutil.rmtree(folder / "run"))
    with pytest.raises(RunError, match=r"run was deleted or moved away while this process"):
        train(configure(folder))
    assert not (folder / "run").exists()


def test_a_run_whose_checkpoints_are_gone_keeps_its_history(folder):
    train(configure(folder, training__steps=4))
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoints are gone(.|\n)*move \S*metrics.jsonl away"):
        train(configure(folder, training__steps=5))
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_accumulation_gives_the_same_run(folder, reference):
    """Micro batches of one row: other rounding, nothing else."""
    train(configure(folder, training__micro_batch_size=1, training__activation_checkpointing=True))
    for ours, theirs in zip(records(folder / "run"), records(reference / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], abs=4e-4)


def test_two_processes_give_the_same_run_and_one_goes_on_with_it(folder, reference):
    """ZeRO 2 in two processes to step 6, then, reading the same lanes, one process at stage 0 to the end."""
    overrides = {"training__steps": 10, "deepspeed": {"zero_optimization": {"stage": 2}}}
    run_ranks(2, "runs", "train", folder, json.dumps(overrides))
    run_dir = folder / "run"
    for step in (9, 10):
        (run_dir / "checkpoints" / f"step_{step:08}" / "manifest.json").unlink()
    two = records(run_dir)
    train(configure(folder))
    expected = records(reference / "run")
    for found in (two, records(run_dir)):
        assert [(each["split"], each["step"], each["tokens"]) for each in found] == [
            (each["split"], each["step"], each["tokens"]) for each in expected
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]


def test_zero_3_runs_the_real_model(folder):
    train(
        configure(folder, deepspeed={"zero_optimization": {"stage": 3}}, model__tie_embeddings=True, training__steps=3)
    )
    last = records(folder / "run")[-1]
    assert last["split"] == "validation" and math.isfinite(last["loss"])


def test_bf16_runs_the_real_model(folder, reference):
    train(configure(folder, training__precision="bf16"))
    ours, theirs = records(folder / "run")[-1], records(reference / "run")[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def poisoned_steps(monkeypatch, poisoned: range) -> None:
    train_step = TrainingEngine.train_step
    steps = 0

    def poison(engine, micro_batches, scale, learning_rate, **others):
        nonlocal steps
        steps += 1
        return train_step(engine, micro_batches, math.nan if steps in poisoned else scale, learning_rate, **others)

    monkeypatch.setattr(TrainingEngine, "train_step", poison)


def test_a_gradient_that_is_not_finite_skips_the_step(folder, monkeypatch, caplog):
    poisoned_steps(monkeypatch, range(2, 4))
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        train(configure(folder, training__log_every=10, safeguards__max_skipped_steps=2))
    skipped = [each for each in records(folder / "run") if each.get("skipped")]
    assert [each["step"] for each in skipped] == [2, 3]
    assert all(each["grad_norm"] is None for each in skipped)
    message = "Step 2 skipped: its loss or gradient is not finite. Weights are unchanged."
    assert message in caplog.text
    events = [each for each in records(folder / "run") if each["split"] == "event"]
    assert [(each["step"], each["event"]) for each in events] == [(2, "skipped"), (3, "skipped")]
    assert events[0]["message"] == message and all("train.txt" in each for each in events[0]["documents"])
    newest = next(iter(checkpoint_folders(folder / "run").values()))
    state = json.loads((newest / "state.json").read_text())
    assert state["skipped_steps"] == 2 and state["optimizer_steps"] == 8 and state["step"] == 10


def test_too_many_skipped_steps_stop_the_run_with_step_and_documents(folder, monkeypatch):
    poisoned_steps(monkeypatch, range(4, 100))
    with pytest.raises(RunError, match=r"Step 6: .* 3 steps in a row(.|\n)*train\.txt") as stopped:
        train(configure(folder, safeguards__max_skipped_steps=2))
    assert len(re.findall(r"train\.txt", str(stopped.value))) >= 4
    assert 3 in checkpoint_folders(folder / "run")


def test_a_run_that_diverges_says_so_keeps_its_checkpoints_and_is_pointed_out_later(folder, caplog, capsys):
    settings = {"optimizer__weight_decay": 0.0, "schedule__warmup_steps": 0}

    def diverging(**overrides: Any) -> RunConfig:
        run = configure(folder, **settings, **overrides)
        run.optimizer.learning_rate = 1e38  # more than a recipe may say
        return run

    run_dir = train(diverging(training__steps=5, training__checkpoint_every=1, training__keep_checkpoints=1))
    assert "unchanged" not in caplog.text and "Step 2 skipped" in caplog.text
    assert "Step 2: Weights are not finite" in caplog.text or "Step 1: Weights are not finite" in caplog.text
    assert len(checkpoint_folders(run_dir)) > 1  # of which an older one may be of use
    with pytest.raises(RunError, match=r"The run has diverged by step 5\. .*not finite.*step_00000005"):
        conclude(run_dir, [], {})
    assert "Final validation: not finite" in capsys.readouterr().out
    caplog.clear()
    with pytest.raises(RunError, match=r"Step \d+: .* Weights are not finite"):
        train(diverging(training__steps=20, safeguards__max_skipped_steps=4))
    assert "step_00000005 holds numbers that are not finite, in " in caplog.text


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(folder):
    train(configure(folder, training__steps=2, training__checkpoint_every=2))
    other = configure(
        folder, training__steps=3, model__embedding_dim=32, training__run_dir=str(folder / "other"), data__validation=[]
    )
    train(other)
    place = Path("checkpoints") / "step_00000003"
    shutil.copytree(folder / "other" / place, folder / "run" / place)
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"00003 does not fit(.|\n)*F32 \(257, 32\) there, F32 \(257, 16\) now"):
        train(configure(folder, training__steps=9))
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_field_by_field(folder):
    train(configure(folder, training__steps=2))
    free = {"training__log_every": 5, "training__steps": 3, "training__micro_batch_size": 2, "data__num_workers": 1}
    train(configure(folder, **free))
    with pytest.raises(ValueError) as refused:
        train(configure(folder, model__num_heads=1, optimizer__learning_rate=0.5, **free))
    message = str(refused.value)
    assert "model.num_heads: 2 there, 1 now" in message and "optimizer.learning_rate: 0.01 there, 0.5 now" in message
    assert "log_every" not in message and "another training.run_dir" in message


def test_other_data_under_the_same_name_is_refused(folder):
    train(configure(folder, training__steps=2))
    path = folder / "train.txt"
    path.write_text(path.read_text().swapcase())  # at equal size
    with pytest.raises(ValueError, match=r"trained on other data(.|\n)*sources\[0\]: changed: .*train\.txt"):
        train(configure(folder, training__steps=4))


def test_the_same_data_elsewhere_and_how_it_is_read_are_free_to_change(folder):
    train(configure(folder, training__steps=2))
    (folder / "train.txt").rename(folder / "moved.txt")
    (folder / "held_out.txt").rename(folder / "moved_held_out.txt")
    source = {"kind": "text_lines", "on_bad_document": "skip", "retry_seconds": 5.0, "cache_gib": 0.0, "weight": 2.0}
    moved = {
        "data__sources": [source | {"paths": [str(folder / "moved.txt")]}],
        "data__validation": [source | {"paths": [str(folder / "moved_held_out.txt")]}],
    }
    train(configure(folder, training__steps=4, **moved))
    assert [each["step"] for each in records(folder / "run") if each["split"] == "train"] == [1, 2, 3, 4]
    moved["data__sources"][0]["kind"] = "text"
    with pytest.raises(ValueError, match=r"data\.sources\[0\]\.kind: 'text_lines' there, 'text' now\nSet these"):
        train(configure(folder, training__steps=5, **moved))


def test_after_a_bad_document_is_repaired_the_run_goes_on_from_its_checkpoint(folder):
    path = folder / "train.jsonl"
    lines = [json.dumps({"text": line}) for line in (folder / "train.txt").read_text().splitlines()]
    path.write_text("\n".join([*lines[:9], "{broken", *lines[9:]]))
    run = configure(
        folder,
        data__sources=[{"kind": "jsonl", "paths": [str(path)]}],
        data__shuffle=False,
        training__steps=20,
        training__validate_every=0,
    )
    with pytest.raises(ValueError, match=r"train\.jsonl, line 10: .*Repair the file, or set on_bad_document: skip"):
        train(run)
    assert 0 < max(checkpoint_folders(folder / "run")) < 20
    path.write_text("\n".join(lines))
    train(run)
    assert max(checkpoint_folders(folder / "run")) == 20


def test_never_resuming_and_starting_from_another_run(folder):
    train(configure(folder, training__steps=3))
    with pytest.raises(ValueError, match="already holds a run"):
        train(configure(folder, training__resume="never"))
    other = {"training__run_dir": str(folder / "branch"), "optimizer__learning_rate": 0.002, "training__steps": 5}
    with pytest.raises(ValueError, match=r"is not a checkpoint"):
        train(configure(folder, training__resume=str(folder), **other))
    with pytest.raises(ValueError, match=r"model.num_heads: 2 there, 1 now"):
        train(configure(folder, training__resume=str(folder / "run"), model__num_heads=1, **other))
    train(configure(folder, training__resume=str(folder / "run"), **other))
    branch = records(folder / "branch")
    assert [each["step"] for each in branch if each["split"] == "train"] == [4, 5]
    assert 0 < branch[0]["lr"] <= 0.002


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training__micro_batch_size": 3}, r"micro_batch_size is 3, .* choose one of \[1, 2, 4\]"),
        ({"model__vocab_size": 100}, r"tokenizer has 257 tokens but model.vocab_size is 100"),
        ({"schedule__warmup_steps": 11}, r"warmup \(11\) .* exceed training.steps \(10\)"),
        ({"profile__steps": "10:11"}, r"profile.steps is 10:11, but the run has 10 steps"),
        ({"deepspeed": {"optimizer": {}}}, r"deepspeed.optimizer is not set there"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(overrides, message, folder):
    with pytest.raises(ValueError, match=message):
        train(configure(folder, **overrides))
    assert not (folder / "run").exists()


def kill_again_and_again(folder: Path, seed: int, kills: int, overrides: dict) -> None:
    """A run that is killed at random points ends with the records of one that is not."""
    output = run_alone("runs", "kill", folder, seed, kills, json.dumps(overrides))
    *killed, last = json.loads(output.splitlines()[-1])
    assert last == 0 and killed.count(-signal.SIGKILL) >= kills // 2, killed
    # One that comes to the end before its point of death was complete already.
    assert set(killed) <= {0, -signal.SIGKILL}
    expected = records(folder / "whole" / "run")
    assert len(expected) > 10 and records(folder / "killed" / "run") == expected
    assert not list((folder / "killed" / "run" / "checkpoints").glob(".tmp-*"))


def test_killed_at_random_points_the_run_is_the_same_to_the_last_digit(tmp_path):
    kill_again_and_again(tmp_path, seed=1, kills=4, overrides={})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_many_times_with_workers_at_any_stage(stage, tmp_path):
    overrides = {
        "data__num_workers": 1,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "training__micro_batch_size": 2,
        "training__checkpoint_every": 2,
        "training__steps": 20,
    }
    kill_again_and_again(tmp_path, seed=stage, kills=8, overrides=overrides)
