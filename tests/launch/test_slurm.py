"""Runs under a real Slurm: time limit, preemption by another job, a killed rank, cancellation, and two slurmd."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.nodes import nodes_on_a_switch, why_no_nodes
from tests.launch.scripts import LAUNCH, REPOSITORY, stand_in
from tests.launch.slurm import Slurm, slurm, why_no_slurm
from tests.launch.small_run import (
    STEPS,
    losses,
    status_of,
    undisturbed_losses,
    variables,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm()),
]


@pytest.fixture(scope="module")
def cluster(folder) -> Iterator[Slurm]:
    """Slurm with this machine as its only node."""
    with slurm(folder / "cluster") as made:
        yield made


def submit(
    cluster: Slurm, folder: Path, run: Path, *options: object, processes: int = 2, recipe: Path | None = None
) -> str:
    """Submit train.sbatch for the recipe in `folder` or another, and return the job's number."""
    settings = variables(folder, XLSTM_LM=REPOSITORY, SAVE_SECONDS=40) | {"PROCESSES_PER_NODE": str(processes)}
    output = f"--output={run}.out"
    words = ["sbatch", "--parsable", output, *options, LAUNCH / "slurm" / "train.sbatch", run]
    return cluster.run(*words, "--config", recipe or folder / "recipe.yaml", env=settings, cwd=REPOSITORY)


def wait_for_half(run: Path) -> None:
    wait_until(lambda: len(losses(run)) >= STEPS // 2, "half of the steps")


def finish(cluster: Slurm, job: str, run: Path) -> None:
    """Start a job that was put back into the queue, and wait until it is completed."""

    def is_completed() -> bool:
        state = cluster.state(job)
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), run.with_suffix(
            ".out"
        ).read_text()
        if state == "PENDING":
            cluster.start_now(job)
        return state == "COMPLETED"

    wait_until(is_completed, f"job {job}", 240)


def states(run: Path) -> list[str]:
    return [each["state"] for each in status_of(run)["attempts"]]


def test_a_job_warned_of_its_time_limit_saves_and_goes_on(cluster, folder):
    run = folder / "warned"
    job = submit(cluster, folder, run)
    wait_for_half(run)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as Slurm does ten minutes before the end
    wait_until(lambda: "requeueing job" in (folder / "warned.out").read_text(), "the requeue")
    finish(cluster, job, run)
    assert losses(run) == undisturbed_losses(folder)
    assert states(run) == ["preempted", "finished"]
    logs = sorted(path.name for path in (run / "logs").iterdir())
    assert logs == [f"job_{job}_attempt_0", f"job_{job}_attempt_1"]
    assert all(len(list((run / "logs" / each).rglob("stderr.log"))) == 2 for each in logs), "one a rank and attempt"


def test_a_job_that_a_more_urgent_one_preempts_saves_and_goes_on(cluster, folder):
    run = folder / "preempted"
    job = submit(cluster, folder, run)
    wait_for_half(run)
    script = stand_in(folder / "bin", "urgent.sh", "sleep 1")
    cluster.run("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", script)
    wait_until(lambda: cluster.state(job) != "RUNNING", "the preemption")
    finish(cluster, job, run)
    assert losses(run) == undisturbed_losses(folder)
    assert states(run) == ["preempted", "finished"]


def test_a_job_whose_rank_is_killed_goes_on_from_its_last_checkpoint(cluster, folder):
    run = folder / "killed"
    job = submit(cluster, folder, run)
    wait_for_half(run)
    kill_one_rank(run)
    wait_until(lambda: "requeueing job" in (folder / "killed.out").read_text(), "the requeue", 120)
    finish(cluster, job, run)
    assert losses(run) == undisturbed_losses(folder)
    assert states(run)[-1] == "finished" and len(states(run)) == 2


def kill_one_rank(run: Path) -> None:
    """Kill the process of rank 1 of a run on this machine by SIGKILL."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            settings = (process / "environ").read_bytes().split(b"\0")
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            of_agent = b"torch.distributed.run" in (Path("/proc") / parent / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run).encode() in words and b"RANK=1" in settings and of_agent:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no rank 1 of {run} is running")


def test_a_cancelled_job_saves_and_stays_away(cluster, folder):
    run = folder / "cancelled"
    job = submit(cluster, folder, run)
    wait_for_half(run)
    cluster.run("scancel", job)
    wait_until(lambda: cluster.state(job) == "CANCELLED", "the end of the job")
    assert status_of(run)["state"] == "preempted" and STEPS // 2 <= status_of(run)["step"] < STEPS


def test_a_run_with_a_wrong_recipe_is_not_requeued(cluster, folder):
    run = folder / "wrong"
    job = submit(cluster, folder, run, recipe=folder / "none.yaml")
    wait_until(lambda: cluster.state(job) == "FAILED", "the end of the job")
    assert "none.yaml" in (folder / "wrong.out").read_text()


@pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes())
def test_slurm_trains_on_two_nodes_and_replaces_a_lost_one(folder, tmp_path):
    run = folder / "replaced"
    with nodes_on_a_switch(3, tmp_path) as nodes, slurm(tmp_path / "cluster", list(nodes)) as cluster:
        job = submit(cluster, folder, run, "--nodes=2", processes=1)
        wait_for_half(run)
        nodes[1].kill()
        wait_until(lambda: cluster.state(job) != "RUNNING", "the end of the first attempt", 150)
        finish(cluster, job, run)
        assert losses(run) == undisturbed_losses(folder)
        assert states(run)[-1] == "finished"
