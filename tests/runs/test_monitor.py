from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from xlstm_lm.base.processes import start_of_process
from xlstm_lm.runs import monitor as module
from xlstm_lm.runs.heartbeats import BeatFile, Heartbeat, read_beat, read_heartbeats, silent_nodes, write_heartbeats
from xlstm_lm.runs.monitor import Monitor, Watched, WatchedRank
from xlstm_lm.runs.status import ENDED_AT_ONCE, RunStatus, read_status, record_end, write_status

LIMITS = {"start": 100.0, "compile": 100.0, "step": 5.0, "validation": 50.0, "save": None}
SLEEP = "import time; time.sleep(600)"


class Job:
    """Two sleeping processes in place of ranks, their beats, and a monitor with a clock of its own."""

    def __init__(self, folder: Path, launcher: int | None = None) -> None:
        self.run_dir, self.ahead = folder / "run", 0.0
        self.run_dir.mkdir()
        attempt = {"attempt": 1, "from_step": 0, "to_step": 0, "state": "running"}
        status = {"state": "running", "reason": "", "step": 0, "steps": 9, "attempt": 1, "updated": ""}
        write_status(self.run_dir, RunStatus(**status, attempts=[attempt]))
        self.processes = [subprocess.Popen([sys.executable, "-c", SLEEP]) for _ in range(2)]
        ranks = []
        for rank, process in enumerate(self.processes):
            place = folder / f"rank{rank}"
            place.mkdir()
            started = start_of_process(process.pid)
            ranks.append(WatchedRank(rank=rank, pid=process.pid, started=started, folder=str(place)))
            ranks[-1].stacks_path.write_text("stacks")
        self.beats = [BeatFile(rank.beat_path) for rank in ranks]
        watched = Watched(
            run_dir=str(self.run_dir),
            attempt=1,
            node="here_0",
            host="here",
            limits=LIMITS,
            ranks=ranks,
            launcher=launcher,
            launcher_started=start_of_process(launcher) if launcher else "",
            launcher_is_torchrun=launcher is not None,
            meeting_point="",
        )
        assert Watched.from_json(watched.to_json()) == watched
        self.monitor = Monitor(watched, clock=lambda: time.monotonic() + self.ahead)

    def beat(self, *phases: str, steps: tuple[int, int] = (3, 3)) -> None:
        for beats, phase, step in zip(self.beats, phases, steps, strict=True):
            beats.write(phase, step)

    def reason(self) -> str:
        found = self.monitor.look()
        assert found is not None
        return found.reason

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STACK_SECONDS", 0.0)
    made = Job(tmp_path)
    yield made
    made.end()


def test_ranks_at_work_are_left_alone_and_seen_from_elsewhere(job):
    job.beat("step", "save", steps=(3, 4))
    assert job.monitor.look() is None
    seen = read_heartbeats(job.run_dir)
    assert [(each.rank, each.phase, each.step) for each in seen] == [(0, "step", 3), (1, "save", 4)]
    assert all(each.host == "here" and abs(each.time - time.time()) < 5 for each in seen)


@pytest.mark.parametrize(
    ("phase", "seconds", "hangs"),
    [("step", 4, False), ("step", 6, True), ("validation", 6, False), ("validation", 51, True), ("save", 1e6, False)],
)
def test_each_phase_has_a_limit_of_its_own(job, phase, seconds, hangs):
    job.beat(phase, phase)
    job.ahead = seconds
    assert (job.monitor.look() is not None) is hangs


def test_ranks_that_never_beat_are_in_the_start(job):
    job.ahead = 99
    assert job.monitor.look() is None
    job.ahead = 101
    assert "start after step 0" in job.reason()


def test_the_rank_that_is_behind_is_missing(job):
    job.beat("step", "step", steps=(4, 3))
    job.ahead = 6
    assert "the run hangs: step after step 4 has lasted 6 s" in job.reason()
    assert "missing, in step after step 3: rank 1 on here." in job.reason()


def test_a_stopped_rank_is_named(job):
    job.beat("step", "step")
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    job.ahead = 6
    while "stopped" not in job.reason():  # the signal needs a moment
        time.sleep(0.01)
    assert f"a signal has stopped rank 1 (process {job.processes[1].pid}) on here" in job.reason()


def test_a_rank_of_another_node_is_missing(job):
    elsewhere = Heartbeat(rank=2, host="there", pid=1, step=2, phase="step", time=time.time())
    write_heartbeats(job.run_dir, "there_1", [elsewhere])
    job.beat("step", "step")
    job.ahead = 6
    assert "missing, in step after step 2: rank 2 on there." in job.reason()


def test_a_silent_node_is_named_where_all_stand_in_the_same_place(job):
    elsewhere = Heartbeat(rank=2, host="there", pid=1, step=3, phase="step", time=time.time())
    write_heartbeats(job.run_dir, "there_1", [elsewhere])
    job.beat("step", "step")
    job.ahead = 6
    found = job.monitor.look()
    assert "same place" in found.reason and not found.is_sure
    os.utime(job.run_dir / "heartbeats" / "there_1.json", (0, 0))
    assert silent_nodes(job.run_dir, 60) == ["there_1"]
    assert "nothing is heard of there_1" in job.reason()


def test_ranks_that_cannot_reach_rank_0_are_named(job):
    elsewhere = Heartbeat(rank=2, host="there", pid=1, step=3, phase="step", time=time.time())
    write_heartbeats(job.run_dir, "there_1", [elsewhere])
    job.beat("step", "step")
    job.ahead = 6
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        job.monitor.watched = replace(job.monitor.watched, meeting_point=address)
        assert "same place" in job.reason()
    found = job.monitor.look()
    assert f"rank 0 on here, rank 1 on here cannot reach rank 0 at {address}" in found.reason and found.is_sure


def test_summaries_are_frequent_where_limits_are_short(job):
    job.beat("step", "step")
    assert job.monitor.look() is None
    before = read_heartbeats(job.run_dir)[0].time
    for ahead, is_new in ((LIMITS["step"] / 8, False), (LIMITS["step"] / 3, True)):
        job.ahead = ahead
        job.beat("step", "step")
        assert job.monitor.look() is None
        assert (read_heartbeats(job.run_dir)[0].time > before) is is_new


def test_a_wall_clock_that_is_set_back_changes_nothing(job, monkeypatch):
    job.beat("step", "step")
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    assert job.monitor.look() is None
    job.ahead = 6
    assert "hangs" in job.reason()


def test_a_rank_that_has_gone_leaves_the_others_time_for_an_end_of_their_own(job):
    job.beat("save", "step")
    job.processes[1].kill()
    job.processes[1].wait()
    assert job.monitor.look() is None
    job.ahead = module.GRACE_SECONDS - 1
    assert job.monitor.look() is None
    job.ahead = module.GRACE_SECONDS + 1
    assert f"rank 1 (process {job.processes[1].pid}) on here ended without a message" in job.reason()


def test_ranks_that_are_all_gone_are_reported_at_once_and_ended_ones_are_not(job):
    job.beat("step", "done")
    assert job.monitor.look() is None
    job.end()
    assert "rank 0" in job.reason() and "rank 1" not in job.reason()
    job.beat("done", "failed")
    assert job.reason() == ""


def test_a_failure_here_or_elsewhere_ends_those_that_remain(job):
    job.beat("save", "failed")
    assert job.monitor.look() is None
    job.ahead = module.GRACE_SECONDS + 1
    assert "rank 1 on here failed" in job.reason()
    job.beat("save", "save")
    assert job.monitor.look() is None
    record_end(job.run_dir, 1, "failed", "rank 7 on there is missing")
    assert job.monitor.look() is None
    job.ahead *= 2
    assert job.reason() == "rank 7 on there is missing"


@pytest.mark.parametrize("phases", [("compile", "failed"), ("compile", "compile")], ids=["here", "elsewhere"])
def test_a_rank_that_a_signal_ended_at_once_ends_those_that_remain(job, phases):
    reason = f"SIGUSR1 {ENDED_AT_ONCE}"
    write_status(job.run_dir, replace(read_status(job.run_dir), state="preempted", reason=reason))
    job.beat(*phases)
    assert job.monitor.look() is None
    job.ahead = module.GRACE_SECONDS + 1
    assert job.reason() == reason
    job.monitor.end_job(reason)
    assert read_status(job.run_dir).state == "preempted"


def test_the_launcher_must_live(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", SLEEP])
    job = Job(tmp_path, launcher=launcher.pid)
    try:
        job.beat("save", "save")
        assert job.monitor.look() is None
        launcher.kill()
        launcher.wait()
        assert job.monitor.look() is None
        job.ahead = module.GRACE_SECONDS + 1
        assert f"the launcher (process {launcher.pid} on here) was killed" in job.reason()
    finally:
        launcher.kill()
        launcher.wait()
        job.end()


@pytest.mark.parametrize("is_torchrun", [True, False])
def test_torchrun_must_end_after_a_failure_and_no_other_launcher(tmp_path, monkeypatch, is_torchrun):
    monkeypatch.setattr(module, "LAUNCHER_SECONDS", 0.2)
    launcher = subprocess.Popen([sys.executable, "-c", SLEEP])
    job = Job(tmp_path, launcher.pid)
    job.monitor.watched = replace(job.monitor.watched, launcher_is_torchrun=is_torchrun)
    try:
        job.beat("step", "done")
        assert not job.monitor.has_failed_rank()
        job.beat("step", "failed")
        assert job.monitor.has_failed_rank()
        job.monitor.end_launcher()
        time.sleep(0.1)
        assert (launcher.poll() is not None) is is_torchrun
    finally:
        launcher.kill()
        launcher.wait()
        job.end()


def test_the_end_of_a_job_is_recorded_with_stacks_and_kills_its_ranks(job, capfd):
    job.beat("step", "step")
    assert job.monitor.look() is None
    for process in job.processes:
        os.kill(process.pid, signal.SIGSTOP)
    job.monitor.end_job("it hangs")
    assert all(process.wait(timeout=10) < 0 for process in job.processes)
    status = read_status(job.run_dir)
    assert (status.state, status.reason, status.requeue) == ("failed", "it hangs", True)
    assert (status.attempts[0]["state"], status.attempts[0]["reason"]) == ("failed", "it hangs")
    for rank in range(2):
        text = (job.run_dir / "hang" / f"attempt_0001_rank_{rank:04}.txt").read_text()
        assert text.startswith("it hangs") and text.endswith("stacks")
    assert "xlstm-lm monitor: it hangs" in capfd.readouterr().err
    job.monitor.close()
    assert not (job.run_dir / "heartbeats").exists()
    assert all(read_beat(rank.beat_path) is None for rank in job.monitor.watched.ranks)


def test_a_run_folder_that_has_gone_is_not_made_again(job):
    job.beat("step", "step")
    (job.run_dir / "status.json").unlink()
    job.run_dir.rmdir()
    assert job.monitor.look() is None
    job.monitor.end_job("the folder has gone")
    job.monitor.close()
    assert not job.run_dir.exists()


def test_a_reason_from_outside_replaces_no_better_one(job):
    record_end(job.run_dir, 2, "failed", "of another attempt")
    assert read_status(job.run_dir).state == "running"
    record_end(job.run_dir, 1, "failed", "first")
    record_end(job.run_dir, 1, "failed", "second")
    assert read_status(job.run_dir).reason == "first"


def test_damaged_heartbeats_are_named(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "a_0.json").write_text('{"ranks": [{"rank": 1}]}')
    with pytest.raises(ValueError, match=r"a_0.json is damaged"):
        read_heartbeats(tmp_path)
