"""The hints on how to go on repeat how the program was started."""

from __future__ import annotations

import sys

import pytest

from xlstm_lm.parallel import launcher

TORCHRUN = ["/env/bin/python", "/env/bin/torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
DEEPSPEED = ["/env/bin/python3", "/env/bin/deepspeed", "--num_gpus", "2", "--module", "xlstm_lm", "train"]
LAUNCH = ["/env/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "--module", "xlstm_lm", "train"]


@pytest.fixture
def started(monkeypatch):
    """The hint for a program with these ancestors and variables."""

    def hint(*ancestors: list[str], argv: str = "/env/bin/xlstm-lm", **variables: str) -> list[str]:
        for name in ("RANK", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [argv, "train"])
        monkeypatch.setattr(launcher, "_ancestors", lambda: list(ancestors))
        return launcher.program_command(launched=True)

    return hint


@pytest.mark.parametrize(
    ("ancestors", "expected"),
    [
        ([[*TORCHRUN, "-m", "xlstm_lm", "train"]], [*TORCHRUN[1:], "-m", "xlstm_lm"]),
        (
            [["sh"], [*TORCHRUN, "--no-python", "xlstm-lm"]],
            [*TORCHRUN[1:], "--no-python", "xlstm-lm"],
        ),
        ([LAUNCH, DEEPSPEED, ["bash"]], DEEPSPEED[1:6]),
        (
            [["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "-m", "xlstm_lm", "train"]],
            ["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "-m", "xlstm_lm"],
        ),
    ],
)
def test_the_launchers_own_command(started, ancestors, expected):
    assert started(*ancestors, RANK="0") == expected


def test_where_the_launcher_is_no_ancestor(started):
    torchrun = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}
    assert started(**torchrun) == ["torchrun", "--nproc-per-node", "4", "-m", "xlstm_lm"]
    several = ["torchrun", "--nnodes", "2", "--rdzv-endpoint", "HOST:PORT", "--nproc-per-node", "4", "-m", "xlstm_lm"]
    assert started(**torchrun, GROUP_WORLD_SIZE="2") == several
    assert started(RANK="0", LOCAL_SIZE="2") == ["deepspeed", "--num_gpus", "2", "--module", "xlstm_lm"]


def test_without_a_launcher(started, monkeypatch):
    assert started() == ["/env/bin/xlstm-lm"]
    monkeypatch.setattr(launcher.shutil, "which", lambda name: f"/env/bin/{name}")
    assert started() == ["xlstm-lm"]
    monkeypatch.setattr(sys, "executable", "/other/bin/python")
    assert started(argv="/x/xlstm_lm/__main__.py") == ["/other/bin/python", "-m", "xlstm_lm"]
    for elsewhere in ("/x/notebook.py", "/x/pytest/__main__.py"):
        assert started(argv=elsewhere) == ["xlstm-lm"]
