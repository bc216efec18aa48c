"""Checkpoints that all ranks write in the background: nothing older is lost, and each rank reads only its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.training.equivalence import build_engine
from tests.training.layouts import load, losses, save, snapshot
from tests.training.processes import environment, run_ranks
from tests.training.runs import configure, write_text
from xlstm_lm import cli
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.runs import checkpoint_writer
from xlstm_lm.runs.checkpoint import damage, newest_checkpoint, read_checkpoint
from xlstm_lm.runs.checkpoint_layout import HostBuffers
from xlstm_lm.runs.checkpoint_list import merge
from xlstm_lm.runs.checkpoint_writer import CheckpointWriter
from xlstm_lm.training.loop import train

PHASES = [
    "write_shares",
    "write_durably random",
    "write_durably state.json",
    "write_durably manifest.json",
    "replace_durably",
]
"""Functions of the writer, and names of files, in which a rank dies."""


@pytest.fixture(scope="module")
def engine():
    _, built = build_engine(join_world(), 0)
    yield built
    built.close()


@pytest.mark.slow
def test_two_ranks_write_and_read_their_shares_and_survive_a_full_disk(tmp_path, small_disk):
    report = json.loads(run_ranks(2, "saving", "read", tmp_path, small_disk).splitlines()[-1])
    message = report.pop("full disk")
    assert len(report) == 16
    folder = newest_checkpoint(tmp_path / "stage0")
    elements = sum(
        torch.Size(shape).numel()
        for stem in ("model", "optimizer")
        for _, shape in read_checkpoint(folder).forms(stem).values()
    )
    for case, ranks in report.items():
        assert all(equal for _, equal in ranks), case
        read = [size for size, _ in ranks]
        if case.endswith("0"):
            assert read == [4 * elements] * 2
        else:  # each byte is read by one rank
            assert sum(read) == 4 * elements and max(read) < 0.6 * 4 * elements, case
    for stage in range(4):
        files = sorted(newest_checkpoint(tmp_path / f"stage{stage}").glob("*.safetensors"))
        assert len(files) == 4 and max(file.stat().st_size for file in files[:2]) < 0.75 * 4 * elements / 3 + 2000
    assert "the disk is full" in message


def test_the_weights_may_change_while_a_save_is_on_its_way_and_the_next_one_waits(engine, tmp_path, monkeypatch):
    world, may_write = join_world(), threading.Event()
    write = checkpoint_writer.write_shares

    def slow(path, shares):
        assert may_write.wait(60)
        return write(path, shares)

    monkeypatch.setattr(checkpoint_writer, "write_shares", slow)
    before = {name: value.clone() for name, value in engine.state.weights()}
    writer = CheckpointWriter(world, lambda: tmp_path)
    writer.save(snapshot(engine, step=1))
    assert not writer.is_ready and not checkpoint_folders(tmp_path)
    writer.finish_copy()
    with torch.no_grad():
        for _, value in engine.state.weights():
            value.add_(1.0)
    threading.Timer(0.2, may_write.set).start()
    writer.save(snapshot(engine, step=2))  # waits
    assert list(checkpoint_folders(tmp_path)) == [1]
    writer.wait()
    first, second = (
        read_checkpoint(folder).all_weights() for _, folder in sorted(checkpoint_folders(tmp_path).items())
    )
    for name, value in before.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value + 1.0)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_an_update_waits_until_the_weights_are_copied(stage, precision, tmp_path, monkeypatch):
    world, may_copy = join_world(), threading.Event()
    copy = HostBuffers.copy

    def slow(self, stem, shares):
        assert may_copy.wait(60)
        return copy(self, stem, shares)

    _, engine = build_engine(world, stage, precision=precision)
    writer = CheckpointWriter(world, lambda: tmp_path)
    engine.before_update = writer.finish_copy
    losses(world, engine, 0, 1)  # moments are no longer zero
    stored = {"model": dict(engine.state.weights()), "optimizer": dict(engine.state.moments())}
    before = {stem: {name: value.clone() for name, value in of.items()} for stem, of in stored.items()}
    monkeypatch.setattr(HostBuffers, "copy", slow)
    writer.save(snapshot(engine, step=1))
    threading.Timer(0.3, may_copy.set).start()
    losses(world, engine, 1, 2)
    assert may_copy.is_set(), "the update has not waited"
    writer.wait()
    saved = read_checkpoint(newest_checkpoint(tmp_path))
    for stem, values in before.items():
        for name, value in values.items():
            assert torch.equal(saved.part(stem, name, 0, value.numel()), value.flatten()), name
    changed = dict(engine.state.weights())
    assert not all(torch.equal(changed[name], value) for name, value in before["model"].items())
    engine.close()


def test_a_copy_that_fails_fails_the_save(engine, tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(HostBuffers, "copy", broken)
    writer = CheckpointWriter(join_world(), lambda: tmp_path)
    writer.save(snapshot(engine, step=1))
    writer.finish_copy()
    with pytest.raises(RunError, match="no room"):
        writer.wait()
    assert not checkpoint_folders(tmp_path)


def test_a_prepared_writer_allocates_no_host_memory_in_its_first_save(engine, tmp_path):
    writer = CheckpointWriter(join_world(), lambda: tmp_path)
    writer.prepare(engine.state.shares())
    before = {stem: buffer.data_ptr() for stem, buffer in writer._buffers._buffers.items()}
    writer.save(snapshot(engine, step=1))
    writer.wait()
    assert before.keys() == {"model", "optimizer"}
    assert before == {stem: buffer.data_ptr() for stem, buffer in writer._buffers._buffers.items()}


def test_a_holder_that_has_lost_its_lease_publishes_nothing(engine, tmp_path):
    world, lost = join_world(), False

    def place() -> Path:
        if lost:
            raise RunError("taken over by process 7")
        return tmp_path

    save(world, engine, tmp_path, step=1)
    writer = CheckpointWriter(world, place)
    writer.save(snapshot(engine, step=2))
    lost = True
    with pytest.raises(RunError, match="taken over by process 7"):
        writer.wait()
    assert list(checkpoint_folders(tmp_path)) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("where", PHASES)
@pytest.mark.parametrize("dying", [0, 1])
def test_death_in_any_phase_loses_nothing_older(where, dying, tmp_path):
    where = where.replace("random", f"random_rank{dying:04}.pt")
    if dying and ("json" in where or "replace" in where):
        pytest.skip("rank 0 alone publishes")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "tests.training.saving", "die", str(tmp_path), where, str(dying)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    newest = newest_checkpoint(tmp_path)
    assert newest.name == ("step_00000002" if where == "replace_durably" else "step_00000001"), done.stderr[-2000:]
    checkpoint_writer.remove_leftovers(tmp_path)
    _, engine = build_engine(join_world(), 0)
    load(engine, newest)
    engine.close()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("flip", "its checksum differs"),
        ("cut", "bytes instead of"),
        ("remove", "is missing from its checkpoint"),
        ("overlap", "its pieces do not join at element 0"),
        ("forget", "is damaged"),
    ],
)
def test_damage_is_named_and_the_older_checkpoint_used(harm, problem, engine, tmp_path, caplog):
    good, bad = (save(join_world(), engine, tmp_path, step=step) for step in (1, 2))
    shard, manifest = bad / "model_rank0000.safetensors", bad / "manifest.json"
    content = bytearray(shard.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif harm == "cut":
        shard.write_bytes(content[:-4])
    elif harm == "remove":
        shard.unlink()
    else:
        values = json.loads(manifest.read_text())
        if harm == "overlap":
            values["tensors"]["model"]["norm.weight"]["pieces"][0][1] = 1
        else:
            del values["tensors"]
        manifest.write_text(json.dumps(values))
    assert problem in damage(bad) and newest_checkpoint(tmp_path) == good
    assert str(bad) in caplog.text


def test_steps_to_keep_are_saved_and_kept_and_the_command_lists_verifies_and_merges(tmp_path, capsys):
    write_text(tmp_path)
    settings = {"training__keep_at": [2], "training__keep_every": 5, "training__keep_checkpoints": 1}
    run_dir = train(configure(tmp_path, training__steps=7, training__validate_every=0, **settings))
    assert sorted(checkpoint_folders(run_dir)) == [2, 5, 7]
    cli.main(["checkpoint", str(run_dir), "--verify"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[1], row[2], row[4], row[5]) for row in rows] == [
        ("2", "2", "1", "ever", "intact"),
        ("5", "2", "1", "ever", "intact"),
        ("7", "2", "1", "newest", "intact"),
    ]
    out = tmp_path / "merged.safetensors"
    cli.main(["checkpoint", str(run_dir), "--merge", "5", "--out", str(out)])
    expected = read_checkpoint(checkpoint_folders(run_dir)[5]).all_weights()
    merged = safetensors.torch.load_file(out)
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 6; its checkpoints are of steps 2, 5, 7"):
        merge(run_dir, 6, tmp_path / "other")
    with pytest.raises(ValueError, match=r"merged.safetensors exists"):
        merge(run_dir, 5, out)
    shard = checkpoint_folders(run_dir)[7] / "optimizer_rank0000.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", str(run_dir)])
    captured = capsys.readouterr()
    assert "optimizer_rank0000.safetensors is damaged" in captured.out and "of step 7" in captured.err
    branch = {"training__resume": str(checkpoint_folders(run_dir)[2]), "training__run_dir": str(tmp_path / "branch")}
    train(configure(tmp_path, training__steps=3, training__validate_every=0, **branch))
    assert list(checkpoint_folders(tmp_path / "branch")) == [3]
