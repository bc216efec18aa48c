"""A real Slurm of Debian's packages with its own folders, ports and keys: on this machine, or on nodes of a switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.launch.nodes import Node

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")


def why_no_slurm() -> str:
    """Reason why Slurm cannot be started here; empty if it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "starting slurmd needs root"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _configuration(folder: Path, hosts: Mapping[str, str], ports: Sequence[int]) -> str:
    """The slurm.conf. Partition `urgent` preempts jobs of partition `normal`, which are requeued."""
    first, address = next(iter(hosts.items()))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={name} NodeAddr={ip} Port={port} CPUs=8 RealMemory=8000 Gres=gpu:8 State=UNKNOWN"
        for (name, ip), port in zip(hosts.items(), ports[2:])
    )
    return f"""
ClusterName=launch_tests
SlurmctldHost={first}({address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
SlurmdTimeout=20
SlurmctldTimeout=60
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
"""


class Slurm:
    """Commands of a running Slurm."""

    def __init__(self, folder: Path, controller: Node | None) -> None:
        self.folder, self.controller = folder, controller

    def run(self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a command of Slurm to its end, on the controller's node, and return its output."""
        command = self.controller.command(words) if self.controller else list(map(str, words))
        variables = {**(env or os.environ), "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, such as PENDING, RUNNING or COMPLETED."""
        shown = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())
        return shown["JobState"]

    def start_now(self, job: str) -> None:
        """Start a requeued job after 6 seconds. Slurm waits for two minutes, until old credentials have expired.

        Sooner, the node may still refuse the job as one that has ended, which counts as another attempt.
        """
        time.sleep(6)
        with contextlib.suppress(AssertionError):  # it has just started by itself
            self.run("scontrol", "update", f"jobid={job}", "starttime=now")


@contextlib.contextmanager
def slurm(folder: Path, nodes: Sequence[Node] = ()) -> Iterator[Slurm]:
    """Run munged, slurmctld and a slurmd on each node, or all on this machine; ended with the context."""
    folder.mkdir()
    for name in ("state", "munge"):
        (folder / name).mkdir(mode=0o700)
    hosts = {node.name: node.address for node in nodes} or {socket.gethostname(): "127.0.0.1"}
    ports = _free_ports(2 + len(hosts))
    (folder / "slurm.conf").write_text(_configuration(folder, hosts, ports))
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    variables = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.ExitStack() as stack:

        def daemon(name: str, words: list[str], node: Node | None = None) -> None:
            command = node.command(words) if node else words
            with (folder / f"{name}.out").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
            stack.callback(_end, process)

        munge = [
            f"--{what}={folder}/munge/{what.split('-')[0]}" for what in ("socket", "pid-file", "log-file", "seed-file")
        ]
        daemon("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *munge])
        controller = nodes[0] if nodes else None
        daemon("slurmctld", ["slurmctld", "-D", "-i", "-f", f"{folder}/slurm.conf"], controller)
        for index, name in enumerate(hosts):
            words = ["slurmd", "-D", "-N", name, "-f", f"{folder}/slurm.conf"]
            daemon(f"slurmd.{name}", words, nodes[index] if nodes else None)
        made = Slurm(folder, controller)
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(AssertionError):
                if made.run("sinfo", "--noheader", "--partition=normal", "--format=%t %D") == f"idle {len(hosts)}":
                    break
            assert time.monotonic() < until, "\n".join(file.read_text()[-1500:] for file in folder.glob("*.log"))
            time.sleep(0.2)
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()
