"""The GPU kernels compile for every target, within its shared memory, and nothing spills where that costs most."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'xlstm-lm[gpu]')", allow_module_level=True)

from eval.bench.compile_cases import CASES, preset_mlstm_heads, preset_slstm_heads, preset_ssd_heads
from eval.compile_report import TARGETS, Compiled, key, rows_of, summary

REPORT = Path(__file__).parents[2] / "eval/results/compile-report.json"
REMEDY = "python -m eval.compile_report --missing --out eval/results/compile-report.json"
OTHER_TARGETS = [each for each in TARGETS if each != "sm_90"]
LAUNCHED = """
import json, sys
from eval.bench.compile_cases import CASES
from eval.compile_report import shipped
print(json.dumps([[case, call.kernel, to, call.launch] for case, to, call in shipped(list(CASES), sys.argv[1:])]))
"""
"""A program that prints the key of each kernel that is launched on the targets of its arguments."""

SAME_KERNELS = """
import torch
from eval.bench.compile_cases import mlstm_calls
checked, trained = (
    {call.identity: call.kernel for call in mlstm_calls(64, 128, torch.bfloat16, "sm_90", **shape)}
    for shape in ({"B": 2, "T": 70, "H": 2}, {"B": 8, "T": 8192, "H": 4, "state": False})
)
print(len(trained), *(name for key, name in trained.items() if key not in checked))
"""
"""A program that prints how many kernels training compiles, and the names of those that a check has not."""


def compiled(*arguments: str) -> list[dict]:
    """Rows of `eval.compile_report`, from a process where Triton compiles (here it may interpret)."""
    printed = run_without_interpreter("-m", "eval.compile_report", "--json", *arguments)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def run_without_interpreter(*arguments: str) -> str:
    """The output of a Python process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    return run.stdout


def triton_version() -> tuple[int, ...]:
    """Major and minor, without importing it: in this process it may interpret."""
    return tuple(int(part) for part in version("triton").split(".")[:2])


def check(rows: list[dict], kernels: set[str]) -> None:
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]


def test_a_report_is_printed_as_a_table() -> None:
    arguments = ("--quick", "--operations", "mlstm_step", "--targets", "sm_90")
    heading, *lines = run_without_interpreter("-m", "eval.compile_report", *arguments).splitlines()
    assert heading.split() == "configuration kernel target registers spilled shared seconds ...".split()
    registers, spilled, shared, _seconds = lines[0].partition("sm_90")[2].split()[:4]
    assert int(registers) > 0 and int(spilled) == 0 and int(shared) >= 0
    assert all(line.index("sm_90") == heading.index("target") for line in lines)


def test_the_walks_compile_for_hopper() -> None:
    rows = compiled("--quick", "--operations", "mlstm", "--targets", "sm_90", "--kernel", "walk_kernel")
    check(rows, {"walk_kernel"})
    assert len(rows) == 4, "h, and the gradients of q, k and v"
    assert all("HGMMA" in row["instructions"] and "HMMA" not in row["instructions"] for row in rows)


def test_every_head_of_every_preset_is_compiled() -> None:
    assert {(256, 512), (128, 256), (384, 384), (768, 768), (1024, 1024)} <= preset_mlstm_heads()
    names = {case.name for operation in CASES.values() for case in operation()}
    assert {f"mlstm K{K} V{V} bfloat16 preset" for K, V in preset_mlstm_heads()} <= names
    assert (128, 64) in preset_ssd_heads()
    assert {f"ssd K{K} V{V} bfloat16 preset" for K, V in preset_ssd_heads()} <= names
    assert {192, 256, 384, 512} <= preset_slstm_heads()
    for D in preset_slstm_heads():
        assert {f"slstm D{D} bfloat16 B16", f"slstm cluster D{D} bfloat16"} <= names


def test_a_summary_counts_kernels_and_spills_by_target() -> None:
    row = {"target": "sm_80", "registers": 64, "shared_bytes": 2048, "spilled_bytes": 0}
    more = {"registers": 255, "shared_bytes": 4095, "spilled_bytes": 8}
    lines = summary([row, row | more, row | {"spilled_bytes": 4}, row | {"target": "gfx942"}]).splitlines()
    assert lines[2:] == [
        "| gfx942 | 1 | 64 | 2 KiB (64) | none |",
        "| sm_80 | 3 | 255 | 3 KiB (163) | 2, by 8 bytes a thread at most |",
    ]


def test_training_compiles_no_kernel_after_its_check() -> None:
    assert run_without_interpreter("-c", SAME_KERNELS).split() == ["16"]


@pytest.mark.slow
def test_the_widest_walks_of_the_paper_do_not_spill_on_hopper() -> None:
    rows = compiled("--case", "K768 V768", "--operations", "mlstm", "--targets", "sm_90", "--kernel", "walk_kernel")
    check(rows, {"walk_kernel"})


def test_cards_with_little_shared_memory_compile_no_head_that_they_refuse() -> None:
    rows = compiled("--case", "K1024 V1024", "--operations", "mlstm", "--targets", "sm_89")
    rows += compiled("--case", "slstm D80", "--operations", "slstm", "--targets", "sm_89")
    assert rows == []


@pytest.mark.parametrize(
    ("target", "measured", "passes"),
    [
        ("sm_90", {"spilled_bytes": 0, "shared_bytes": 232448}, True),
        ("sm_90", {"spilled_bytes": 4}, False),
        ("sm_90", {"spilled_bytes": 0, "shared_bytes": 232449}, False),
        ("sm_90", {"spilled_bytes": 0, "problem": "00a0 MOV writes the left operand"}, False),
        ("sm_89", {"spilled_bytes": 16, "shared_bytes": 101376}, True),
        ("sm_89", {"spilled_bytes": 0, "shared_bytes": 101377}, False),
        ("sm_80", {"spilled_bytes": 88}, True),
        ("sm_80", {"spilled_bytes": 132}, False),
        ("gfx942", {"spilled_bytes": 11000}, False),
        ("gfx942", {"spilled_bytes": None}, False),
    ],
)
def test_the_guard_fails_on_spills_and_on_too_much_shared_memory(target: str, measured: dict, passes: bool) -> None:
    assert Compiled(case="", kernel="", target=target, launch="", **measured).passed == passes


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_the_scores_compile_for_other_targets(target: str) -> None:
    rows = compiled("--quick", "--operations", "mlstm", "--targets", target, "--kernel", "scores_kernel")
    check(rows, {"scores_kernel", "dscores_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_of_the_mlstm_compiles(target: str) -> None:
    kernels = {"gates_kernel", "key_sums_kernel", "contributions_kernel", "join_kernel", "scores_kernel", "walk_kernel"}
    rows = compiled("--operations", "mlstm", "--targets", target)
    check(rows, kernels | {"dscores_kernel", "gate_gradients_kernel"})


def test_the_decode_step_compiles_and_parts_of_a_report_add_up(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    step = ("--quick", "--operations", "mlstm_step", "--out", str(out), "--targets")
    check(compiled(*step, "gfx942"), {"step_kernel"})
    check(compiled(*step, "sm_90"), {"step_kernel"})
    report = json.loads(out.read_text())
    assert [(row["target"], row["ptxas"] is None) for row in report["rows"]] == [("gfx942", True), ("sm_90", False)]

    report["rows"][0]["launch"] = "a launch of the past"
    out.write_text(json.dumps(report))
    assert [row["target"] for row in compiled("--missing", *step, "sm_90", "gfx942")] == ["gfx942"]
    rows = json.loads(out.read_text())["rows"]
    assert [row["target"] for row in rows] == ["sm_90", "gfx942"] and rows[0] == report["rows"][1]


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHER_TARGETS)])
def test_the_committed_report_holds_each_kernel_as_it_is_launched(target: str) -> None:
    rows = [row for row in rows_of(REPORT) if row["target"] == target]
    launched = json.loads(run_without_interpreter("-c", LAUNCHED, target))
    assert sorted(map(list, map(key, rows))) == sorted(launched), f"compile what changed: {REMEDY}"
    fields = {field.name for field in dataclasses.fields(Compiled)}
    results = [Compiled(**{name: value for name, value in row.items() if name in fields}) for row in rows]
    assert [each for each in results if not each.passed] == []


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
