from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.processes import environment
from tests.training.runs import configure, records, write_text
from xlstm_lm.runs.heartbeats import read_heartbeats
from xlstm_lm.runs.status import read_status, should_requeue
from xlstm_lm.training.loop import train

LIMITS = {"safeguards__hang_step_minutes": 0.1, "training__checkpoint_every": 2}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def meet(fate: str, folder: Path, **overrides: object) -> str:
    """Train until the job ends by its fate; returns its output. No process of it is left."""
    write_text(folder)
    words = ["-m", "tests.training.hanging", fate, str(folder), json.dumps(LIMITS | overrides)]
    done = subprocess.run(
        [*LAUNCHER, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode != 0, done.stdout
    until = time.monotonic() + 60
    while alive := [path for path in Path("/proc").glob("[0-9]*") if str(folder) in _command(path)]:
        assert time.monotonic() < until, [_command(path) for path in alive]
        time.sleep(0.2)
    return done.stdout


def _command(path: Path) -> str:
    try:
        return (path / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def goes_on_as_if_nothing_had_happened(folder: Path, reference: Path) -> None:
    train(configure(folder))
    found, expected = records(folder / "run"), records(reference / "run")
    assert [(each["split"], each["step"]) for each in found] == [(each["split"], each["step"]) for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
    status = read_status(folder / "run")
    assert (status.state, status.attempt) == ("finished", 2)


def failure(folder: Path) -> str:
    status = read_status(folder / "run")
    assert status.state == "failed" and should_requeue(status)[0], status
    assert read_heartbeats(folder / "run") == []
    return status.reason


def test_a_stopped_rank_ends_the_job_with_its_name_and_all_stacks(tmp_path, reference):
    output = meet("stopped", tmp_path)
    reason = failure(tmp_path)
    assert "the run hangs: step after step 4" in reason and "stopped rank 1" in reason, reason
    assert f"xlstm-lm monitor: {reason}" in output
    stacks = [(tmp_path / "run" / "hang" / f"attempt_0001_rank_000{rank}.txt").read_text() for rank in range(2)]
    assert all("train_step" in each or "fated" in each for each in stacks), stacks
    goes_on_as_if_nothing_had_happened(tmp_path, reference)


@pytest.mark.slow
def test_a_warning_of_one_rank_in_the_first_step_preempts_the_run(tmp_path, reference):
    meet("warned", tmp_path)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("preempted", "SIGUSR1 ended the run at once."), status
    assert should_requeue(status)[0] and not (tmp_path / "run" / "checkpoints").exists()
    goes_on_as_if_nothing_had_happened(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("asleep", r"the run hangs: step after step 4 has lasted"),
        ("killed", r"rank 1 \(process \d+\) on \S+ ended without a message: killed by a signal"),
        ("all", r"rank 0 \(process \d+\), rank 1 \(process \d+\) on \S+ ended without a message"),
        ("launcher", r"the launcher \(process \d+ on \S+\) was killed"),
        ("worker", r"a data worker was killed by SIGKILL"),
        ("error", r"list index out of range"),
        ("saving", r"rank 1 \(process \d+\) on \S+ ended without a message: killed by a signal"),
    ],
)
def test_nothing_is_lost_and_the_cause_is_named(fate, reason, tmp_path, reference):
    began = time.monotonic()
    # More steps than there are rows on the way from the worker.
    worker = {
        "data__num_workers": 1,
        "data__prefetch_batches": 1,
        "training__steps": 200,
        "training__checkpoint_every": 5,
    }
    meet(fate, tmp_path, **(worker if fate == "worker" else {}))
    assert time.monotonic() - began < 120
    assert re.search(reason, failure(tmp_path)), failure(tmp_path)
    if fate == "worker":
        return  # it has made more steps than the reference
    goes_on_as_if_nothing_had_happened(tmp_path, reference)
