"""Runs on two nodes of one machine: torchrun, DeepSpeed's launcher over ssh, and nodes and links that fail."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.nodes import Node, Nodes, nodes_on_a_switch, why_no_nodes
from tests.launch.scripts import LAUNCH, REPOSITORY, stand_in
from tests.launch.small_run import (
    STEPS,
    losses,
    status_of,
    undisturbed_losses,
    variables,
    wait_until,
)
from xlstm_lm.runs.monitor import LAUNCHER_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes())]


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    with nodes_on_a_switch(3, tmp_path) as made:
        yield made


def launch(nodes: list[Node], folder: Path, run: Path, *flags: object, **more: object) -> list[subprocess.Popen[bytes]]:
    """Start torchrun.sh on each of some nodes."""
    words = [LAUNCH / "torchrun.sh", run, "--config", folder / "recipe.yaml", *flags]
    started = []
    for rank, node in enumerate(nodes):
        meeting = {"NNODES": len(nodes), "NODE_RANK": rank, "RENDEZVOUS": f"{nodes[0].name}:29500"}
        settings = variables(folder, **meeting, **more)
        started.append(node.start(words, folder / f"{run.name}.{node.name}.log", env=settings, cwd=REPOSITORY))
    return started


def ended_with(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes of processes that must end within some seconds."""
    wait_until(lambda: all(each.poll() is not None for each in processes), "the launchers to end", seconds)
    return [each.returncode for each in processes]


def test_torchrun_trains_on_two_nodes_as_on_one(nodes, folder):
    run = folder / "two_nodes"
    assert ended_with(launch([nodes[0], nodes[1]], folder, run), 180) == [0, 0]
    assert losses(run) == undisturbed_losses(folder)
    assert sorted(path.name for path in (run / "logs").glob("*/node_*")) == ["node_0", "node_1"]
    assert status_of(run)["state"] == "finished"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_goes_on_with_another_node_when_one_is_lost(nodes, folder, lost):
    run = folder / f"lost{lost}"
    launched = launch([nodes[0], nodes[1]], folder, run)
    wait_until(lambda: len(losses(run)) >= STEPS // 2, "half of the steps")
    nodes[lost].kill()
    assert 0 not in ended_with(launched, 90)
    assert len(losses(run)) < STEPS
    status = status_of(run)
    assert status["state"] == "failed" and "lost the connection" in status["reason"], status
    # The lease of a lost rank 0 is stale after a minute.
    assert ended_with(launch([nodes[1 - lost], nodes[2]], folder, run), 240) == [0, 0]
    assert losses(run) == undisturbed_losses(folder)
    assert [each["state"] for each in status_of(run)["attempts"]] == ["failed", "finished"]


HANG_SECONDS = 6
SHORT_LIMIT = ("--safeguards.hang_step_minutes", HANG_SECONDS / 60)


def test_a_cut_link_ends_the_job_with_all_stacks_and_the_run_goes_on_when_it_is_back(nodes, folder):
    run = folder / "cut"
    launched = launch([nodes[0], nodes[1]], folder, run, *SHORT_LIMIT)
    wait_until(lambda: len(losses(run)) >= STEPS // 2, "half of the steps")
    nodes.link(1, "down")
    wait_until(lambda: status_of(run)["state"] == "failed", "the monitors to see it", HANG_SECONDS + 30)
    assert 0 not in ended_with(launched, LAUNCHER_SECONDS + 30)
    status = status_of(run)
    assert "the run hangs: step after step" in status["reason"] and status["requeue"], status
    assert "rank 1 on node1 cannot reach rank 0 at node0:" in status["reason"], status
    for rank in range(2):
        stacks = (run / "hang" / f"attempt_0001_rank_{rank:04}.txt").read_text()
        assert f"rank {rank} on node{rank}" in stacks and "run_steps" in stacks, stacks
    nodes.link(1, "up")
    assert ended_with(launch([nodes[0], nodes[1]], folder, run, *SHORT_LIMIT), 180) == [0, 0]
    assert losses(run) == undisturbed_losses(folder)
    assert [each["state"] for each in status_of(run)["attempts"]] == ["failed", "finished"]


def test_a_slow_link_slows_the_run_and_changes_nothing(nodes, folder):
    run = folder / "slow"
    print(f"slowed by: {nodes.slow_down(1)}")
    assert ended_with(launch([nodes[0], nodes[1]], folder, run), 300) == [0, 0]
    assert losses(run) == undisturbed_losses(folder)
    assert status_of(run)["state"] == "finished"


def with_sshd(node: Node, folder: Path) -> None:
    """Run sshd on a node, for the key that `ssh_in` makes."""
    Path("/run/sshd").mkdir(exist_ok=True)
    configuration = folder / f"sshd_config.{node.name}"
    configuration.write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nPermitRootLogin yes\n"
        f"UsePAM no\nPidFile none\nListenAddress {node.address}\n"
    )
    node.start([shutil.which("sshd"), "-D", "-e", "-f", configuration], folder / f"sshd.{node.name}.log")
    wait_until(lambda: ":22 " in node.run("ss", "-ltn"), f"sshd on {node.name}", 20)


def ssh_in(folder: Path) -> Path:
    """A folder with an `ssh` that uses a key of its own and the keys of nobody else."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    options = f"-i {folder}/user_key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    return stand_in(folder / "bin", "ssh", f'exec {shutil.which("ssh")} -F none {options} "$@"').parent


MISSING = [name for name in ("pdsh", "sshd", "ssh", "ssh-keygen", "ss") if not shutil.which(name)]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: apt-get install pdsh openssh-server")
def test_deepspeeds_launcher_trains_on_two_nodes_over_ssh(nodes, folder, tmp_path):
    run, programs = folder / "deepspeed", ssh_in(tmp_path)
    for node in (nodes[0], nodes[1]):
        with_sshd(node, tmp_path)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    settings = variables(folder, HOSTFILE=hostfile, PROCESSES_PER_NODE=None)
    settings |= {"PATH": f"{programs}:{settings['PATH']}"}
    words = [LAUNCH / "deepspeed.sh", run, "--config", folder / "recipe.yaml"]
    started = nodes[0].start(words, folder / "deepspeed.log", env=settings, cwd=REPOSITORY)
    assert ended_with([started], 240) == [0], (folder / "deepspeed.log").read_text()[-3000:]
    assert losses(run) == undisturbed_losses(folder)
    assert len(list((run / "logs").rglob("*rank*.log"))) == 2


def test_deepspeeds_launcher_trains_on_this_machine(folder):
    run = folder / "deepspeed_here"
    settings = variables(folder) | {"PROCESSES_PER_NODE": "2"}
    words = [LAUNCH / "deepspeed.sh", run, "--config", folder / "recipe.yaml"]
    done = subprocess.run(
        list(map(str, words)), env=settings, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(run) == undisturbed_losses(folder)
