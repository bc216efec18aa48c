"""The kernels of mamba_ssm and causal_conv1d as backends: shown by stand-ins, since the real ones take a GPU."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from tests.ops import mamba_packages
from xlstm_lm.base.announce import announce_once
from xlstm_lm.models import MambaConfig, build_model
from xlstm_lm.ops import operation as operation_module
from xlstm_lm.ops import ssd
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.conv import CONV, causal_conv
from xlstm_lm.ops.operation import choose, recorded_choices, verify
from xlstm_lm.ops.selective_scan import SCAN, selective_scan
from xlstm_lm.ops.selective_scan.operation import scan_inputs
from xlstm_lm.ops.selfcheck import TOLERANCE, compare
from xlstm_lm.ops.ssd import SSD, ssd_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHECKS = {
    SCAN: ("mamba_ssm", {"N": 16}),
    SSD: ("mamba_ssm", {"P": 64, "N": 128}),
    CONV: ("causal_conv1d", {"D": 24, "W": 4}),
}
"""Operation -> the backend of a package, and sizes to check it at."""
pytestmark = pytest.mark.usefixtures("fresh_choices")


def with_states(operation):
    """A scan as a function of all its inputs, the state too: its values and its last state."""

    def function(*inputs, **options):
        *inputs, state = inputs
        return operation(*inputs, initial_state=state, return_state=True, **options)

    return function


@pytest.fixture
def packages(monkeypatch):
    mamba_packages.install(monkeypatch)


def resets_of(kind: str, B: int, T: int) -> torch.Tensor | None:
    """No documents, a few, many, or one at each step; the first row goes on a state in all but the last."""
    shares = {"none": 0.0, "few": 0.05, "many": 0.4, "each step": 1.0}
    resets = torch.rand(B, T) < shares[kind]
    resets[0, 0] = kind == "each step"
    return None if kind == "none" else resets


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "few", "many", "each step"])
@pytest.mark.parametrize(("operation", "inputs"), [(selective_scan, scan_inputs), (ssd.ssd, ssd_inputs)])
def test_documents_and_states_go_through_mamba_ssm(operation, inputs, kind, dtype):
    torch.manual_seed(0)
    made = inputs("cpu", dtype, T=70, N=8)
    run = functools.partial(with_states(operation), resets=resets_of(kind, 2, 70))
    error = compare(functools.partial(run, backend="mamba_ssm"), functools.partial(run, backend="recurrence"), made)
    assert error < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype] / 2)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("rate", [1e-6, 1e4])
def test_a_document_is_alone_and_a_state_whole_whatever_the_decays(rate):
    torch.manual_seed(0)
    x, dt, _, b, c, state = scan_inputs("cpu", torch.float32, T=12)
    decays = -rate * torch.rand(24, 16)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[1, [0, 5]] = True
    run = functools.partial(with_states(selective_scan), resets=resets)
    ours, definition = (functools.partial(run, backend=name) for name in ("mamba_ssm", "recurrence"))
    assert compare(ours, definition, [x, dt, decays, b, c, state]) < 1e-5
    y, last = ours(x, dt, decays, b, c, state)
    alone, its_last = with_states(selective_scan)(x[1:, 5:], dt[1:, 5:], decays, b[1:, 5:], c[1:, 5:], 0 * state[1:])
    torch.testing.assert_close((y[1:, 5:], last[1:]), (alone, its_last))


@pytest.mark.usefixtures("packages")
def test_the_scan_through_mamba_ssm_is_given_no_more_steps_than_documents_and_states_take(monkeypatch):
    lengths = []
    module = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    monkeypatch.setattr(
        module,
        "selective_scan_fn",
        lambda u, *rest: lengths.append(u.shape[2]) or mamba_packages.selective_scan_fn(u, *rest),
    )
    *inputs, state = scan_inputs("cpu", torch.float32, T=20, N=4)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[0, [3, 4, 19]] = resets[1, 0] = True
    selective_scan(*inputs, backend="mamba_ssm")
    selective_scan(*inputs, resets=resets, backend="mamba_ssm")
    selective_scan(*inputs, resets=resets, initial_state=state, return_state=True, backend="mamba_ssm")
    assert lengths == [20, 23, 31]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "few", "many", "each step"])
@pytest.mark.parametrize("T", [1, 2, 33])
def test_documents_and_states_go_through_causal_conv1d(T, kind, dtype):
    torch.manual_seed(0)
    # As a model hands it over: an odd part of one projection, which the kernel could not read where it lies.
    shapes = ((2, T, 5 + 16 + 3), (16, 4), (16,), (2, 3, 16))
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    options = {"resets_BT": resets_of(kind, 2, T), "return_state": True}

    def run(projected, weight, bias, state, backend):
        return causal_conv(projected[..., 5:21], weight, bias, initial_state_BWD=state, backend=backend, **options)

    ours, definition = (functools.partial(run, backend=name) for name in ("causal_conv1d", "torch"))
    assert compare(ours, definition, inputs) < (1e-6 if dtype == torch.float32 else TOLERANCE[dtype] / 2)
    del options["return_state"]
    state_left_out = [functools.partial(run, state=None, backend=name) for name in ("causal_conv1d", "torch")]
    assert compare(*state_left_out, inputs[:3]) < (1e-6 if dtype == torch.float32 else TOLERANCE[dtype] / 2)


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_through_the_packages_is_the_model(version, monkeypatch):
    torch.manual_seed(0)
    config = MambaConfig(version=version, vocab_size=29, embedding_dim=24, num_blocks=2, head_dim=12, state_dim=8)
    model = build_model(config)
    tokens_BT, resets_BT = torch.randint(0, 29, (2, 40)), resets_of("few", 2, 40)

    def results():
        model.zero_grad()
        first_BTD, state = model(tokens_BT[:, :25], resets_BT[:, :25], return_state=True)
        second_BTD = model(tokens_BT[:, 25:], resets_BT[:, 25:], state)
        hidden_BTD = torch.cat((first_BTD, second_BTD), dim=1)
        model.loss(hidden_BTD, tokens_BT).backward()
        return hidden_BTD, [parameter.grad for parameter in model.parameters()]

    expected = results()
    mamba_packages.install(monkeypatch, checked_on=())
    with recorded_choices() as taken:
        torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-4)
    scan = "selective scan" if version == 1 else "ssd"
    assert taken == {scan: ["mamba_ssm"], "convolution": ["causal_conv1d"]}


@pytest.mark.parametrize("operation", CHECKS, ids=lambda operation: operation.name)
def test_kernels_that_are_wrong_or_broken_are_found(operation):
    name, sizes = CHECKS[operation]
    before = torch.random.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.MonkeyPatch.context() as right:
            mamba_packages.install(right)
            with torch.inference_mode():  # as where a model generates
                assert verify(operation, name, make_call(CPU, dtype, sizes)) is None
    for spoil, reason in (
        (mamba_packages.wrong_in_value, "its values or gradients are wrong"),
        (mamba_packages.wrong_in_a_gradient, "its values or gradients are wrong"),
        (mamba_packages.broken, "it does not run (no kernel image is available)"),
    ):
        with pytest.MonkeyPatch.context() as spoilt:
            mamba_packages.install(spoilt, spoil)
            assert reason in verify(operation, name, make_call(CPU, torch.float32, sizes))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_convolution_leaves_to_torch_what_the_package_does_not_take(monkeypatch):
    mamba_packages.install(monkeypatch)
    reason = lambda **sizes: verify(CONV, "causal_conv1d", make_call(CPU, torch.float32, sizes))
    assert reason(D=8, W=2) is None
    assert "it does not run (expected multiples of 8)" in reason(D=12, W=4) and "it does not run" in reason(D=8, W=5)


@pytest.mark.parametrize("right", [True, False])
def test_what_auto_means_on_a_gpu(right, monkeypatch, caplog):
    announce_once.cache_clear()
    calls = {operation: make_call(CUDA, torch.bfloat16, sizes) for operation, (_, sizes) in CHECKS.items()}
    monkeypatch.setattr(operation_module.importlib.util, "find_spec", lambda name: None)  # no package is installed
    chosen = lambda: {operation.name: choose(operation, call).backend for operation, call in calls.items()}
    plain = {"selective scan": "recurrence", "ssd": "mlstm", "convolution": "torch"}
    assert chosen() == plain
    assert "mamba_ssm is not installed" in caplog.text and "SSD" not in caplog.text
    monkeypatch.undo()
    mamba_packages.install(monkeypatch)
    monkeypatch.setattr(operation_module, "verdict", lambda *asked: None if right else "it is wrong")
    packages = {"selective scan": "mamba_ssm", "ssd": "mamba_ssm", "convolution": "causal_conv1d"}
    assert chosen() == (packages if right else plain)
    caplog.clear()
    assert choose(SCAN, calls[SCAN]._replace(one_step=True)).backend == "recurrence" and not caplog.text
