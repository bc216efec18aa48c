"""Signals and the time limit: a run is saved and goes on, or ends before there is anything to save."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.processes import environment
from tests.training.runs import configure, records
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.data import TrainingStream
from xlstm_lm.runs.status import read_status
from xlstm_lm.training import trainer
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import as_recipe


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_is_saved_and_goes_on(number, folder, reference, monkeypatch, capsys):
    batches = 0
    next_batch = TrainingStream.next_batch
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(stream):
        nonlocal batches
        batches += 1
        if batches == 5:
            os.kill(os.getpid(), number)
        return next_batch(stream)

    monkeypatch.setattr(TrainingStream, "next_batch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(configure(folder))
    assert stopped.value.code == 0
    assert list(checkpoint_folders(folder / "run")) == [5, 3]
    assert f"xlstm-lm train --config {folder}/run/config.yaml" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    found = read_status(folder / "run")
    assert (found.state, found.step) == ("stopped" if number == signal.SIGINT else "preempted", 5)
    assert signal.Signals(number).name in found.reason and found.requeue is (number != signal.SIGINT)
    train(configure(folder))
    found = read_status(folder / "run")
    assert (found.state, found.step, found.attempt) == ("finished", 10, 2)
    assert records(folder / "run") == records(reference / "run")


def test_a_time_limit_stops_the_run_as_preempted(folder, reference):
    with pytest.raises(SystemExit):
        train(configure(folder, training__max_hours=1e-6))
    found = read_status(folder / "run")
    assert (found.state, found.step, found.requeue) == ("preempted", 1, True) and "max_hours" in found.reason
    train(configure(folder))
    assert records(folder / "run") == records(reference / "run")


def test_before_the_first_step_ctrl_c_stops_at_once(folder, monkeypatch):
    monkeypatch.setattr(trainer, "unbuilt_model", lambda config: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(configure(folder))
    assert not (folder / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_warning_while_the_program_is_imported_preempts_the_run(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(as_recipe(configure(folder)))
    words = [sys.executable, "-m", "xlstm_lm", "train", "--config", recipe]
    process = subprocess.Popen(words, env=environment())
    held_back = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigBlk:\s*(\w+)", held_back.read_text())[1], 16) & 1 << signal.SIGUSR1 - 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 128 + signal.SIGUSR1
    found = read_status(folder / "run")
    assert (found.state, found.reason, found.requeue) == ("preempted", "SIGUSR1 ended the run at once.", True)


FIRST_STEP = {"start": (trainer, "unbuilt_model"), "compile": (TrainingEngine, "train_step")}
"""Functions that are called in each phase before the first step is made."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", FIRST_STEP)
def test_before_the_first_step_a_signal_preempts_at_once_and_the_next_start_is_undisturbed(
    phase, number, folder, reference, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(*FIRST_STEP[phase], lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            train(configure(folder))
    assert stopped.value.code == 128 + number
    found = read_status(folder / "run")
    assert (found.state, found.step, found.requeue) == ("preempted", 0, True)
    assert found.reason == f"{signal.Signals(number).name} ended the run at once."
    left = {path.name for path in (folder / "run").iterdir()}
    assert not left & {"lease.json", "checkpoints", "heartbeats", "hang"}, left
    train(configure(folder))
    assert records(folder / "run") == records(reference / "run")
    assert [each["state"] for each in read_status(folder / "run").attempts] == ["preempted", "finished"]
