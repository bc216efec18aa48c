"""Requeueing by the state of a run: train.sbatch and pod.sh, with stand-ins for srun, scontrol and torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.launch.scripts import LAUNCH, REPOSITORY, environment, run_script, stand_in

NAMES = 'hostnames) printf "first\\nsecond\\n" ;;'


def attempt(number: int, state: str, from_step: int, to_step: int) -> dict[str, Any]:
    """One entry of the list `attempts` of a status.json."""
    now = datetime.now(UTC).isoformat()
    return {
        "attempt": number,
        "from_step": from_step,
        "to_step": to_step,
        "state": state,
        "reason": f"{state} for a test",
        "host": "first",
        "started": now,
    }


def write_status(run: Path, *attempts: dict[str, Any]) -> None:
    """Write the status.json of a run of 10 steps after some attempts."""
    run.mkdir(exist_ok=True)
    last = attempts[-1]
    status = {
        "state": last["state"],
        "reason": last["reason"],
        "step": last["to_step"],
        "steps": 10,
        "attempt": last["attempt"],
        "updated": last["started"],
        "attempts": list(attempts),
        "requeue": last["state"] in ("preempted", "failed", "running"),
    }
    (run / "status.json").write_text(json.dumps(status))


PROGRESS = [attempt(1, "failed", 0, 4)]
NO_STEP = [attempt(number, "failed", 4, 4) for number in (1, 2, 3)]
CASES = {
    "finished": ([attempt(1, "finished", 0, 10)], 0, False),
    "preempted": ([attempt(1, "preempted", 0, 4)], 1, True),
    "preempted, and srun reports success": ([attempt(1, "preempted", 0, 4)], 0, True),
    "failed after progress": (PROGRESS, 1, True),
    "failed three times without a step": (NO_STEP, 1, False),
    "killed before it could write its state": ([attempt(1, "running", 0, 4)], 137, True),
}
"""Attempts in status.json, the exit code of srun or torchrun, and whether the run must be started again."""
each_case = pytest.mark.parametrize(("attempts", "code", "again"), list(CASES.values()), ids=list(CASES))


class Job:
    """A job of Slurm that exists only in the environment of train.sbatch."""

    def __init__(self, folder: Path, srun: str) -> None:
        """Make the stand-ins. `srun` is the body of srun's, which may write to `folder`/calls."""
        self.run, self.calls = folder / "run", folder / "calls"
        self.calls.touch()
        stand_in(folder / "bin", "srun", f'echo "srun $*" >> {self.calls}\n{srun}')
        stand_in(folder / "bin", "scontrol", f'case $2 in {NAMES} *) echo "scontrol $*" >> {self.calls} ;; esac')
        self.variables = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": 7,
            "SLURM_JOB_NODELIST": "first,second",
            "SLURM_JOB_NUM_NODES": 2,
            "SLURM_SUBMIT_DIR": REPOSITORY,
        }

    def submit(self) -> subprocess.CompletedProcess[str]:
        """Run the script to its end."""
        return run_script(LAUNCH / "slurm" / "train.sbatch", self.run, "--config", "recipe.yaml", **self.variables)

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 7" in self.calls.read_text()


@each_case
def test_slurm_requeues_what_the_run_allows(tmp_path, attempts, code, again):
    job = Job(tmp_path, f"exit {code}")
    write_status(job.run, *attempts)
    done = job.submit()
    assert job.requeued == again, done
    assert done.returncode == (0 if again else code)
    srun = job.calls.read_text().splitlines()[0]
    assert "--kill-on-bad-exit=1" in srun and srun.endswith(f"node {job.run} --config recipe.yaml")


def test_slurm_does_not_requeue_a_run_that_left_no_state(tmp_path):
    job = Job(tmp_path, "exit 1")  # such as after a recipe that does not exist: the next start would fail as well
    done = job.submit()
    assert not job.requeued and done.returncode != 0, done


def test_slurm_does_not_requeue_where_the_state_cannot_be_read(tmp_path):
    job = Job(tmp_path, "exit 1")
    write_status(job.run, *PROGRESS)
    job.variables["PYTHON"] = stand_in(tmp_path / "bin", "python", "exit 127")
    done = job.submit()
    assert not job.requeued and done.returncode == 1
    assert f"the state of {job.run} cannot be read (code 127), so the job is not requeued" in done.stderr


WAITS_FOR = """
ended=
trap 'ended=yes; echo "srun got {name}" >> {calls}' {name}
while [ -z "$ended" ]; do sleep 0.05; done
sleep 0.5  # the run saves, while the shell's first wait has ended with {code}
echo "srun saved" >> {calls}
exit 1
"""


def signalled(tmp_path: Path, name: str) -> tuple[Job, subprocess.CompletedProcess[str]]:
    """A job whose batch shell gets a signal, as Slurm sends it, while srun runs."""
    job = Job(tmp_path, "")
    code = 128 + signal.Signals[f"SIG{name}"]
    stand_in(tmp_path / "bin", "srun", WAITS_FOR.format(name=name, calls=job.calls, code=code))
    write_status(job.run, attempt(1, "preempted", 0, 4))
    script = [LAUNCH / "slurm" / "train.sbatch", job.run, "--config", "recipe.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    shell = subprocess.Popen(["bash", *map(str, script)], env=environment(**job.variables), cwd=REPOSITORY, **pipes)
    time.sleep(1)
    shell.send_signal(signal.Signals[f"SIG{name}"])
    output, errors = shell.communicate(timeout=30)
    return job, subprocess.CompletedProcess(script, shell.returncode, output, errors)


def test_the_shell_passes_the_warning_of_the_time_limit_on_and_waits_for_the_save(tmp_path):
    job, done = signalled(tmp_path, "USR1")
    assert job.calls.read_text().splitlines() == ["srun got USR1", "srun saved", "scontrol requeue 7"], done
    assert done.returncode == 0


def test_a_terminated_job_is_saved_but_left_to_slurm(tmp_path):
    job, done = signalled(tmp_path, "TERM")
    assert job.calls.read_text().splitlines() == ["srun got TERM", "srun saved"], done
    assert "a requeue after a preemption or a lost node, none after scancel" in done.stdout


def python_terminated_with_its_caller(folder: Path) -> Path:
    """A Python that gets SIGTERM at its start, as does its caller, like every process of a job on a lost node."""
    return stand_in(folder / "bin", "python", f'kill -TERM "$PPID" $$; sleep 0.2; exec {sys.executable} "$@"')


def test_a_job_terminated_while_its_state_is_read_is_left_to_slurm(tmp_path):
    job = Job(tmp_path, "exit 9")
    write_status(job.run, *PROGRESS)
    job.variables["PYTHON"] = python_terminated_with_its_caller(tmp_path)
    done = job.submit()
    assert not job.requeued and done.returncode == 9, done
    assert "a requeue after a preemption or a lost node" in done.stdout and "cannot be read" not in done.stderr


def test_a_requeue_is_not_cut_short_by_sigterm(tmp_path):
    job = Job(tmp_path, "exit 9")
    write_status(job.run, *PROGRESS)
    requeue = f'kill -TERM "$PPID" $$; sleep 0.2; echo "scontrol $*" >> {job.calls}'
    stand_in(tmp_path / "bin", "scontrol", f"case $2 in {NAMES} *) {requeue} ;; esac")
    assert job.submit().returncode == 0 and job.requeued


def pod_with(folder: Path, torchrun: str) -> Path:
    """A copy of pod.sh beside a stand-in for torchrun.sh."""
    (folder / "kubernetes").mkdir()
    pod = folder / "kubernetes" / "pod.sh"
    pod.write_text((LAUNCH / "kubernetes" / "pod.sh").read_text())
    stand_in(folder, "torchrun.sh", torchrun)
    return pod


@each_case
def test_pods_end_with_the_code_that_the_manifests_read(tmp_path, attempts, code, again):
    run = tmp_path / "run"
    write_status(run, *attempts)
    pod = pod_with(tmp_path, f'echo "$NNODES $NODE_RANK $RENDEZVOUS $*"; exit {code}')
    kubeflow = {"PET_NNODES": 8, "PET_NODE_RANK": 3, "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": 1234}
    done = run_script(pod, run, "--config", "recipe.yaml", **kubeflow, OTHERS_WAIT_SECONDS=0)
    assert done.stdout.splitlines()[0] == f"8 3 first:1234 {run} --config recipe.yaml"
    assert done.returncode == (75 if again else 1 if code else 0), done


def test_a_pod_terminated_while_its_state_is_read_ends_with_the_code_of_that_state(tmp_path):
    pod, run = pod_with(tmp_path, "exit 9"), tmp_path / "run"
    write_status(run, *PROGRESS)
    python = python_terminated_with_its_caller(tmp_path)
    assert run_script(pod, run, "--config", "recipe.yaml", PYTHON=python).returncode == 75
