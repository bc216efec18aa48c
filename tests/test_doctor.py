"""The self-check passes for what is right and fails for what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ops.stand_ins import replace_backend
from xlstm_lm import doctor
from xlstm_lm.ops import mlstm as mlstm_ops
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.conv.shifts import conv_shifts
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_lm.ops.mlstm.operation import mlstm_inputs
from xlstm_lm.ops.native import KernelsUnavailableError
from xlstm_lm.ops.operations import OPERATIONS
from xlstm_lm.ops.selfcheck import compare

pytestmark = pytest.mark.usefixtures("fresh_choices")


def test_every_kernel_on_this_machine_computes_what_it_should():
    checks = list(doctor.check_operations("cpu"))
    assert {(check.operation, check.backend) for check in checks} >= {
        ("mlstm", "recurrence"),
        ("mlstm", "chunkwise"),
        ("mlstm", "compiled"),
        ("mlstm", "step"),
        ("slstm", "recurrence"),
        ("slstm", "compiled"),
        ("attention", "sdpa"),
        ("attention", "by_document"),
        ("loss", "chunked"),
        ("selective scan", "recurrence"),
        ("selective scan", "compiled"),
        ("ssd", "recurrence"),
        ("ssd", "mlstm"),
        ("ssd", "chunkwise"),
        ("convolution", "torch"),
        ("convolution", "compiled"),
    }
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    # What needs a GPU is left out, not listed as failing.
    for_gpus = {
        each.name for operation in OPERATIONS.values() for each in operation.backends if each.devices == ("cuda",)
    }
    assert "triton" in for_gpus and not {check.backend for check in checks} & for_gpus


def wrong_value(*inputs, **options):
    return mlstm_ops.mlstm(*inputs, **options, backend="recurrence") * 1.01


def wrong_gradient(*inputs, **options):
    q, k, v, i, f = inputs
    return mlstm_ops.mlstm(q, k, v, i, f.detach() + 0 * f, **options, backend="recurrence")


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient])
def test_a_wrong_kernel_is_found(wrong):
    inputs = mlstm_inputs("cpu", torch.float32)
    assert compare(mlstm_ops.mlstm, mlstm_ops.mlstm, inputs) < 1e-5
    assert compare(wrong, mlstm_ops.mlstm, inputs) > 1e-3


def test_a_value_that_is_not_finite_is_found():
    inputs = mlstm_inputs("cpu", torch.float32)
    assert compare(lambda *each: mlstm_ops.mlstm(*each) * float("nan"), mlstm_ops.mlstm, inputs) == float("inf")


@pytest.mark.parametrize("place", [0, 1])
def test_a_definition_that_is_not_finite_proves_nothing_right(place):
    """Also where it is not the first of the values or gradients."""

    def definition(x):
        values = [x, 2 * x]
        values[place] = values[place] * float("nan")
        return tuple(values)

    assert compare(lambda x: (x, 2 * x), definition, [torch.ones(3)]) == float("inf")
    assert compare(lambda x: 0 * x, lambda x: 0 * x, [torch.ones(3)]) == 0


def test_a_wrong_kernel_is_reported_by_name(monkeypatch, capsys):
    def wrong(*inputs, **options):
        h, state = mlstm_chunkwise(*inputs, **options)
        return h * 1.01, state

    replace_backend(monkeypatch, MLSTM, "chunkwise", wrong)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["float32"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "BAD mlstm / chunkwise, cpu, float32" in printed
    assert "mlstm / chunkwise does not compute what it should: do not train with it." in printed
    assert "ok  mlstm / compiled" in printed


@pytest.mark.parametrize(
    ("raised", "line_begins", "right"),
    [
        (ValueError("it takes no such heads\nand more"), "  --  ", True),
        (KernelsUnavailableError("no compiler"), "  --  ", True),
        (KeyError("no such target\nand more"), "  BAD ", False),
        (RuntimeError("an illegal memory access was encountered"), "  BAD ", False),
    ],
    ids=lambda each: type(each).__name__,
)
def test_only_a_kernel_that_refuses_is_no_reason_to_stop(raised, line_begins, right, monkeypatch):
    def fails(*inputs, **options):
        raise raised

    replace_backend(monkeypatch, MLSTM, "chunkwise", fails)
    lines: list[str] = []
    assert doctor.examine(lines.append, [torch.float32]) == right
    line = next(line for line in lines if "mlstm / chunkwise, " in line)
    assert line.startswith(line_begins) and str(raised).splitlines()[0] in line
    assert ("not available: " in line) == right
    assert ("  mlstm / chunkwise does not compute what it should: do not train with it." in lines) != right


def test_a_wrong_kernel_of_another_package_is_shown_but_no_reason_to_stop(monkeypatch):
    wrong = lambda x, *others: 1.01 * conv_shifts(x, *others)
    replace_backend(monkeypatch, CONV, "causal_conv1d", wrong, devices=("cpu",))
    lines: list[str] = []
    assert doctor.examine(lines.append, [torch.float32])
    (line,) = (line for line in lines if "convolution / causal_conv1d, " in line)
    assert line.startswith("  --  ") and ": error 1." in line


@pytest.mark.parametrize(
    ("precision", "checked"), [("bf16", [torch.bfloat16, torch.float32]), ("fp32", [torch.float32])]
)
def test_kernels_are_checked_in_what_training_here_computes_in(precision, checked, monkeypatch):
    monkeypatch.setattr(doctor, "choose_precision", lambda choice, device: precision)
    dtypes, lines = [], []
    monkeypatch.setattr(doctor, "check_operations", lambda device, dtype: dtypes.append(dtype) or ())
    assert doctor.examine(lines.append)
    assert dtypes == checked
    name = str(checked[0]).removeprefix("torch.")
    heading = f"\nKernels (training on this machine takes those for {name}: precision auto is {precision})"
    assert heading in lines
    assert any(f"  mlstm, K 16, V 24, {name}: " in each for each in lines)


def test_the_report_on_the_terminal():
    command = [sys.executable, "-m", "xlstm_lm", "doctor", "float32"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for expected in (
        "torch 2.",
        "CPU: ",
        "mlstm, K 16, V 24, float32: compiled",
        "mlstm for one token, K 16, V 24, float32: step",
        "slstm, B 2, D 24, H 2, float32: compiled",
        "selective scan, N 16, float32: compiled",
        "ssd, G 2, N 16, P 24, float32: mlstm",
        "convolution, D 8, W 4, float32: compiled",
        "ok  slstm / compiled",
        "nothing to fix.",
    ):
        assert expected in run.stdout
