"""The launch scripts by themselves: shellcheck, refusals that name the remedy, and the commands that they build."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, REPOSITORY, SCRIPTS, run_script, stand_in

TRAIN, SWEEP = LAUNCH / "slurm" / "train.sbatch", LAUNCH / "slurm" / "sweep.sbatch"
TORCHRUN, DEEPSPEED = LAUNCH / "torchrun.sh", LAUNCH / "deepspeed.sh"
POD = LAUNCH / "kubernetes" / "pod.sh"
RECIPE = ("--config", "configs/train/demo.yaml")
JOB = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": REPOSITORY}
HAS_ALL_PACKAGES = "case $1 in -c) exit 0 ;; esac"
"""Part of a stand-in for Python: every package is found."""
PRINTS_ARGUMENTS = HAS_ALL_PACKAGES + '; printf "%s\\n" "$@"'
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@each_script
def test_scripts_stop_at_the_first_error_and_begin_with_their_usage(script):
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert any(script.name in line for line in lines[1:12] if line.startswith("#"))
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        (TORCHRUN, (), {}, "the run's folder is missing. usage: launch/torchrun.sh RUN --config RECIPE"),
        (TORCHRUN, RECIPE, {}, "the first argument is the run's folder, such as runs/mine, but got the flag --config"),
        (TORCHRUN, ("runs/x",), {}, "--config RECIPE is missing"),
        (TORCHRUN, ("runs/x", *RECIPE, "--training.run_dir", "y"), {}, "--training.run_dir is given twice"),
        (TORCHRUN, ("runs/x", *RECIPE), {"NNODES": "two"}, "NNODES is two; set it to the number of nodes, such as 8"),
        (TORCHRUN, ("runs/x", *RECIPE), {"NNODES": 2}, "NODE_RANK is not set; with 2 nodes, number them from 0 to 1"),
        (
            TORCHRUN,
            ("runs/x", *RECIPE),
            {"NNODES": 2, "NODE_RANK": 2},
            "NODE_RANK is 2; set it to a number from 0 to 1",
        ),
        (TORCHRUN, ("runs/x", *RECIPE), {"NNODES": 2, "NODE_RANK": 1}, "set it to HOST:PORT of node 0, such as node1:"),
        (TORCHRUN, ("runs/x", *RECIPE), {"PYTHON": "/usr/bin/false"}, "activate their environment (source .venv/bin/"),
        (DEEPSPEED, (), {}, "the run's folder is missing. usage: launch/deepspeed.sh RUN --config RECIPE"),
        (DEEPSPEED, RECIPE, {}, "the first argument is the run's folder"),
        (DEEPSPEED, ("runs/x",), {}, "--config RECIPE is missing"),
        (DEEPSPEED, ("runs/x", *RECIPE), {"HOSTFILE": "none"}, "no hostfile none; copy launch/hostfile.example"),
        (DEEPSPEED, ("runs/x", *RECIPE), {"PYTHON": "none"}, "there is no none; set PYTHON to the path of a Python"),
        (TRAIN, (), {}, "SLURM_JOB_ID is not set; start this script with sbatch"),
        (TRAIN, (), JOB, "the run's folder is missing. usage: sbatch --nodes=N launch/slurm/train.sbatch RUN"),
        (TRAIN, RECIPE, JOB, "the first argument is the run's folder"),
        (
            TRAIN,
            ("runs/x",),
            JOB | {"SLURM_SUBMIT_DIR": "/"},
            "call sbatch from the repository's folder, or set XLSTM_LM",
        ),
        (SWEEP, (), JOB, "got 0 arguments, needs one: the list of runs"),
        (SWEEP, ("none.txt",), JOB, "there is no file none.txt; write one run on each line"),
        (SWEEP, ("LICENSE",), JOB, "call sbatch with --array=1-N"),
        (POD, (), {}, "the run's folder is missing. usage: launch/kubernetes/pod.sh RUN --config RECIPE"),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(script, arguments, variables, message):
    done = run_script(script, *arguments, **variables)
    assert done.returncode == (1 if script == POD else 2), done
    assert done.stderr.startswith(f"{script.name}: ") and message in done.stderr
    assert not (REPOSITORY / "runs" / "x").exists()


def torchrun_words(tmp_path: Path, *arguments: object, **variables: object) -> list[str]:
    """Words of the torchrun command that torchrun.sh builds, from a run folder `tmp_path/run` on."""
    python = stand_in(tmp_path / "bin", "python", PRINTS_ARGUMENTS)
    done = run_script(TORCHRUN, tmp_path / "run", *RECIPE, *arguments, PYTHON=python, TMPDIR=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_torchrun_on_one_node_meets_itself_and_passes_the_flags_on(tmp_path):
    words = torchrun_words(tmp_path, "--model.pattern", "[mlstm, slstm]", PROCESSES_PER_NODE=3, ATTEMPT="one")
    assert words[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts"]
    assert "SIGUSR1" in words[words.index("--signals-to-handle") + 1]
    assert words[words.index("--log-dir") + 1] == str(tmp_path / "run" / "logs" / "one" / "node_0")
    program = words[words.index("xlstm_lm") :]
    assert program == [
        "xlstm_lm",
        "train",
        *RECIPE,
        "--model.pattern",
        "[mlstm, slstm]",
        "--training.run_dir",
        program[-1],
    ]
    assert program[-1] == str(tmp_path / "run")


@pytest.mark.parametrize(("rank", "listens"), [(0, "is_host=true"), (1, "is_host=false")])
def test_torchrun_on_several_nodes_meets_on_the_first(tmp_path, rank, listens):
    words = torchrun_words(tmp_path, NNODES=2, NODE_RANK=rank, RENDEZVOUS="first:29500", RENDEZVOUS_ID="job_7")
    settings = dict(zip(words[2::2], words[3::2]))
    assert settings["--nnodes"] == "2" and settings["--rdzv-endpoint"] == "first:29500"
    assert settings["--rdzv-id"] == "job_7" and listens in settings["--rdzv-conf"].split(",")
    assert settings["--log-dir"].endswith(f"node_{rank}")


def test_caches_are_on_the_node_where_the_program_looks_for_them_unless_they_are_set(tmp_path, monkeypatch):
    shows = f"{HAS_ALL_PACKAGES}; echo $TRITON_CACHE_DIR $TORCH_EXTENSIONS_DIR $HF_HOME $HF_TOKEN_PATH"
    python = stand_in(tmp_path / "bin", "python", shows)
    settings = {
        "PYTHON": python,
        "TMPDIR": tmp_path,
        "HOME": "/home/me",
        "TRITON_CACHE_DIR": None,
        "TORCH_EXTENSIONS_DIR": None,
    }
    printed = run_script(TORCHRUN, tmp_path / "run", *RECIPE, **settings).stdout.split()

    from xlstm_lm.base.node_folder import node_local_folder

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = node_local_folder.__wrapped__()  # refuses a folder that others could write to
    names = [str(folder / name) for name in ("triton", "torch_extensions", "huggingface")]
    assert printed == [*names, "/home/me/.cache/huggingface/token"]
    kept = run_script(
        TORCHRUN, tmp_path / "run", *RECIPE, **settings | {"HF_HOME": "/data/hf", "TRITON_CACHE_DIR": "/t"}
    )
    assert kept.stdout.split() == ["/t", names[1], "/data/hf", "/data/hf/token"]


def test_deepspeed_sets_the_node_local_caches_on_every_node(tmp_path):
    shows = PRINTS_ARGUMENTS + '; cat "$DS_ENV_FILE"'
    python, hosts = stand_in(tmp_path / "bin", "python", shows), tmp_path / "hosts"
    stand_in(tmp_path / "bin", "pdsh", "")
    hosts.write_text((LAUNCH / "hostfile.example").read_text())
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    settings = {
        "PYTHON": python,
        "HOSTFILE": hosts,
        "MASTER": "node1",
        "TMPDIR": tmp_path,
        "PATH": path,
        "ATTEMPT": "one",
    }
    words = run_script(DEEPSPEED, tmp_path / "run", *RECIPE, **settings, TRITON_CACHE_DIR=None).stdout.splitlines()
    assert words[words.index("--hostfile") + 1] == str(hosts) and words[words.index("--master_addr") + 1] == "node1"
    assert words[words.index("--enable_each_rank_log") + 1] == str(tmp_path / "run" / "logs" / "one")
    assert f"TRITON_CACHE_DIR={tmp_path}/xlstm_lm-" in "\n".join(words)
    for line in hosts.read_text().splitlines():
        assert re.fullmatch(r"#.*|\w+ slots=\d+", line)


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH options of a script, which must be in one block before its first command, where sbatch reads them."""
    lines = script.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    options = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    return dict(option.removeprefix("--").partition("=")[::2] for option in options)


@pytest.mark.parametrize("script", [TRAIN, SWEEP], ids=lambda path: path.name)
def test_the_batch_shell_is_told_in_time_for_saving_and_jobs_may_be_requeued(script):
    options = directives(script)
    who, _, lead = options["signal"].partition("@")
    assert who == "B:USR1" and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1", "one torchrun a node, which starts the ranks"
    save_seconds = re.search(r"SAVE_SECONDS:-(\d+)", TORCHRUN.read_text())
    assert int(save_seconds[1]) < int(lead), "SIGKILL follows before the job's time ends"
    same = {"nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "mem", "time", "signal", "requeue", "open-mode"}
    assert {name: options[name] for name in same} == {name: directives(TRAIN)[name] for name in same}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (1, ["runs/lr-1e-3", *RECIPE, "--optimizer.learning_rate", "1e-3"]),
        (2, ["runs/two words", *RECIPE, "--model.pattern", "[mlstm, slstm]"]),
        (3, ["runs/sweep/demo", *RECIPE]),
    ],
)
def test_a_sweep_trains_the_run_of_its_line(tmp_path, task, words):
    listed = tmp_path / "list.txt"
    listed.write_text(
        "# learning rates\nruns/lr-1e-3 --config configs/train/demo.yaml --optimizer.learning_rate 1e-3\n\n"
        "'runs/two words' --config configs/train/demo.yaml --model.pattern '[mlstm, slstm]'\nconfigs/train/demo.yaml\n"
    )
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    stand_in(tmp_path / "launch" / "slurm", "train.sbatch", 'printf "%s\\n" "$@"')
    settings = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": tmp_path}
    assert run_script(SWEEP, listed, **settings, SLURM_ARRAY_TASK_ID=task).stdout.splitlines() == words
    refused = run_script(SWEEP, listed, **settings, SLURM_ARRAY_TASK_ID=4)
    assert refused.returncode == 2 and "has 3 runs, and this is task 4" in refused.stderr
