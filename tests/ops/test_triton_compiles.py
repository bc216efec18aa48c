"""The GPU kernels compile for every target, within its shared memory, and nothing spills where that costs most."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'xlstm-lm[gpu]')", allow_module_level=True)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compiled(*arguments: str) -> list[dict]:
    """What `eval.compile_report` says, from a process where Triton compiles (in ours it may interpret)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "eval.compile_report", "--json", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def triton_version() -> tuple[int, ...]:
    """Major and minor, without importing it: in this process it may interpret."""
    return tuple(int(part) for part in version("triton").split(".")[:2])


def check(rows: list[dict], kernels: set[str]) -> None:
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]


def test_the_walks_compile_for_hopper() -> None:
    rows = compiled("--quick", "--operations", "mlstm", "--targets", "sm_90", "--kernel", "walk_kernel")
    check(rows, {"walk_kernel"})
    assert len(rows) == 4, "h, and the gradients of q, k and v"
    assert all("HGMMA" in row["instructions"] and "HMMA" not in row["instructions"] for row in rows)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sm_90"])
def test_the_scores_compile_for_other_targets(target: str) -> None:
    rows = compiled("--quick", "--operations", "mlstm", "--targets", target, "--kernel", "scores_kernel")
    check(rows, {"scores_kernel", "dscores_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_of_the_mlstm_compiles(target: str) -> None:
    kernels = {"gates_kernel", "key_sums_kernel", "contributions_kernel", "join_kernel", "scores_kernel", "walk_kernel"}
    rows = compiled("--operations", "mlstm", "--targets", target)
    check(rows, kernels | {"dscores_kernel", "gate_gradients_kernel"})


def test_the_decode_step_compiles() -> None:
    check(compiled("--quick", "--operations", "mlstm_step", "--targets", "sm_90", "gfx942"), {"step_kernel"})


@pytest.mark.slow
def test_every_decode_step_compiles() -> None:
    check(compiled("--operations", "mlstm_step"), {"step_kernel"})


def test_the_slstm_compiles_for_hopper() -> None:
    rows = compiled("--quick", "--operations", "slstm", "--targets", "sm_90")
    check(rows, {"forward_loop_kernel", "rebuild_kernel", "backward_loop_kernel"})
    matrix_instruction = "HGMMA" if triton_version() >= (3, 8) else "HMMA"  # of a product with eight columns
    assert all(matrix_instruction in row["instructions"] for row in rows if "loop" in row["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_of_the_slstm_compiles(target: str) -> None:
    loops = {"forward_loop_kernel", "rebuild_kernel", "backward_loop_kernel"}
    rows = compiled("--operations", "slstm", "--targets", target)
    check(rows, loops | {"forward_step_kernel", "backward_step_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_everything_of_the_cluster_compiles(target: str) -> None:
    check(compiled("--operations", "slstm_cluster", "--targets", target), {"slstm_forward", "slstm_backward"})
