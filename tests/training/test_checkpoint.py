"""A checkpoint is whole or not there, fits any ZeRO stage and number of processes, and says when it is damaged."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import pytest
import safetensors.torch
import torch

from tests.training.equivalence import build_engine
from tests.training.layouts import continued_run, load, losses, save, whole_run
from tests.training.processes import run_ranks
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.runs import checkpoint_writer
from xlstm_lm.runs.checkpoint import damage, find_checkpoint, newest_checkpoint, read_checkpoint
from xlstm_lm.runs.checkpoint_writer import remove_leftovers
from xlstm_lm.runs.random_state import random_state_bytes, restore_random_state


@pytest.fixture(scope="module")
def engine():
    _, built = build_engine(join_world(), 0)
    yield built
    built.close()


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_same_layout_continues_to_the_last_digit(stage, precision, tmp_path):
    world = join_world()
    expected = whole_run(world, stage, tmp_path, precision)
    assert continued_run(world, stage, tmp_path, precision) == expected


@pytest.fixture(scope="module")
def any_layout(tmp_path_factory):
    """Runs of one process at stages 0 and 3 and of two at every stage, each continued by two at every stage."""
    folder = tmp_path_factory.mktemp("layouts")
    world = join_world()
    report = {f"single whole {stage}": whole_run(world, stage, folder / f"single{stage}") for stage in (0, 3)}
    run_ranks(2, "layouts", folder)
    return folder, report | json.loads((folder / "report.json").read_text())


def test_two_processes_continue_each_others_and_one_process_runs(any_layout):
    _, report = any_layout
    assert len(report) == 2 + 4 + 4 * 4
    for case, found in report.items():
        assert found == pytest.approx(report["single whole 0"], abs=1e-5), case
    for stage in range(4):
        assert report[f"pair{stage} at {stage}"] == report[f"pair whole {stage}"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_process_continues_what_two_began(stage, any_layout):
    folder, report = any_layout
    for source in range(4):
        found = continued_run(join_world(), stage, folder / f"pair{source}")
        assert found == pytest.approx(report["single whole 0"], abs=1e-5), source


def test_files_are_plain_safetensors_by_parameter_name(engine, tmp_path):
    folder = save(join_world(), engine, tmp_path)
    weights = safetensors.torch.load_file(folder / "model_rank0000.safetensors")
    for name, value in engine.state.weights():
        assert torch.equal(weights[name], value.flatten())
    assert set(safetensors.torch.load_file(folder / "optimizer_rank0000.safetensors")) == set(engine.moment_shapes)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n"
    read = read_checkpoint(folder)
    assert all(torch.equal(read.all_weights()[name], value) for name, value in engine.state.weights())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_running_engine_goes_back_to_a_checkpoint(stage, tmp_path):
    world = join_world()
    _, built = build_engine(world, stage)
    losses(world, built, 0, 1)
    folder = save(world, built, tmp_path)
    expected = losses(world, built, 1, 3)
    load(built, folder)
    assert losses(world, built, 1, 3) == expected
    built.close()


def test_the_newest_are_kept_and_leftovers_removed(engine, tmp_path):
    for step in (1, 2, 3, 4):
        save(join_world(), engine, tmp_path, step=step, keep=2)
    assert list(checkpoint_folders(tmp_path)) == [4, 3]
    (tmp_path / "checkpoints" / ".tmp-step_00000005").mkdir()
    (tmp_path / "checkpoints" / ".tmp-latest").touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000003", "step_00000004", "latest"}


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "missing file", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(harm, engine, tmp_path, caplog):
    world = join_world()
    good = save(world, engine, tmp_path, step=1)
    bad = save(world, engine, tmp_path, step=2)
    harmed = bad / ("manifest.json" if "manifest" in harm else "optimizer_rank0000.safetensors")
    content = bytearray(harmed.read_bytes())
    if harm == "flipped bit":
        content[-3] ^= 4
        harmed.write_bytes(content)
    elif harm == "cut short" or harm == "broken manifest":
        harmed.write_bytes(content[:-1])
    else:
        harmed.unlink()
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        assert newest_checkpoint(tmp_path) == good
    assert harmed.name in caplog.text and str(bad) in caplog.text
    # The run comes by again and replaces the damaged one.
    assert save(world, engine, tmp_path, step=2) == bad
    assert newest_checkpoint(tmp_path) == bad
    (good / "state.json").unlink()
    (bad / "state.json").unlink()
    with pytest.raises(ValueError, match=r"None of the 2 checkpoints(.|\n)*step_00000002/state.json is missing"):
        newest_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no manifest.json"):
        find_checkpoint(tmp_path)
    folder = save(join_world(), engine, tmp_path)
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == folder
    with pytest.raises(ValueError, match=r"belongs to another model: 1 tensors .*new\.weight"):
        read_checkpoint(folder).weights([*engine.shapes, "new.weight"])


@pytest.mark.parametrize(
    "file", ["model_rank0000.safetensors", "optimizer_rank0000.safetensors", "state.json", "manifest.json", "latest"]
)
def test_a_full_disk_leaves_the_checkpoint_before(file, engine, tmp_path, monkeypatch):
    world = join_world()
    good = save(world, engine, tmp_path, step=1)

    def full(write):
        def writing(path, content):
            if path.name == file:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, content)

        return writing

    with monkeypatch.context() as patch:
        for name in ("write_durably", "replace_durably", "write_shares"):
            patch.setattr(checkpoint_writer, name, full(getattr(checkpoint_writer, name)))
        with pytest.raises(RunError, match=r"step_00000002: the disk is full; .* MiB are free"):
            save(world, engine, tmp_path, step=2)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"
    assert good in checkpoint_folders(tmp_path).values() and not damage(good)
    shutil.rmtree(tmp_path)


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    content = random_state_bytes()
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    restore_random_state(content)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn
