"""Faults of disks, clocks and people under a whole run: it goes on with the same losses, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.processes import environment
from tests.training.runs import configure, records
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.data import TrainingStream
from xlstm_lm.runs.status import read_status
from xlstm_lm.training.loop import train


def flip(shard: Path) -> None:
    """Flip one bit of the data."""
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def cut(shard: Path) -> None:
    """Lose the end, as after a power cut."""
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(harm, folder, reference, caplog):
    shutil.copytree(reference / "run", folder / "run")
    damaged = [checkpoint_folders(folder / "run")[step] for step in (9, 10)]
    for checkpoint in damaged:
        harm(checkpoint / "optimizer_rank0000.safetensors")
    train(configure(folder))
    assert all(str(checkpoint) in caplog.text for checkpoint in damaged)
    sessions = json.loads((folder / "run" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 6]
    assert records(folder / "run") == records(reference / "run")


def before_batch(number: int, action, monkeypatch) -> None:
    """Have an action done before a batch of a session is read."""
    batches = 0
    next_batch = TrainingStream.next_batch

    def acting(stream):
        nonlocal batches
        batches += 1
        if batches == number:
            action()
        return next_batch(stream)

    monkeypatch.setattr(TrainingStream, "next_batch", acting)


def fill(file: Path) -> None:
    """Leave no room on the disk of a file, however much a save in the background takes of it meanwhile."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(shutil.disk_usage(file.parent).free + 1))


def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(small_disk, folder, reference, monkeypatch):
    on_disk = {"training__run_dir": str(small_disk / "run")}
    filling = small_disk / "filling"
    with monkeypatch.context() as patched:
        # The checkpoint of step 3 is published by then, because the save of step 6 has waited for it.
        before_batch(8, lambda: fill(filling), patched)
        with pytest.raises(RunError, match="the disk is full"):
            train(configure(folder, **on_disk))
    assert 3 in checkpoint_folders(small_disk / "run") and 9 not in checkpoint_folders(small_disk / "run")
    filling.unlink()
    train(configure(folder, **on_disk))
    assert records(small_disk / "run") == records(reference / "run")
    assert (read_status(small_disk / "run").state, read_status(small_disk / "run").attempt) == ("finished", 2)


def test_a_clock_that_is_set_back_changes_nothing(folder, reference, monkeypatch):
    true_time, hours_back = time.time, 0
    monkeypatch.setattr(time, "time", lambda: true_time() - 3600 * hours_back)

    def set_back(hours: int) -> None:
        nonlocal hours_back
        hours_back = hours

    with monkeypatch.context() as patched:
        before_batch(3, lambda: set_back(1), patched)
        before_batch(5, lambda: os.kill(os.getpid(), signal.SIGUSR1), patched)
        with pytest.raises(SystemExit):
            train(configure(folder))
    set_back(24)
    train(configure(folder))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    elapsed = [line["elapsed_seconds"] for line in lines]
    assert elapsed == sorted(elapsed) and 0 < elapsed[-1] < 3600
    assert all(line["tokens_per_second"] > 0 for line in lines if line["split"] == "train")
    assert records(folder / "run") == records(reference / "run")


@pytest.mark.slow
def test_a_second_job_on_a_folder_is_refused_and_the_first_is_undisturbed(folder, reference):
    words = [sys.executable, "-m", "tests.training.runs", "train", str(folder), "{}"]
    first = subprocess.Popen(words, env=environment())
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # alive, however quickly it would have finished
    with pytest.raises(ValueError, match=rf"another process is at work there: process {first.pid} on"):
        train(configure(folder))
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert records(folder / "run") == records(reference / "run")
    assert len(read_status(folder / "run").attempts) == 1
