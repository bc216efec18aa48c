"""The sLSTM's fused operators, with the loops that run anywhere: against the definition, and as operators of PyTorch.

How each backend is chosen on a GPU is shown here too, with stand-ins.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops.stand_ins import replace_backend
from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.operation import choose
from xlstm_lm.ops.selfcheck import errors, some_resets
from xlstm_lm.ops.slstm import SLSTM, cuda_graphs, fused, operation, slstm
from xlstm_lm.ops.slstm.operation import slstm_inputs

batched = functools.partial(slstm, backend="batched")
definition = functools.partial(slstm, backend="recurrence")


def made(B, T, H, D, dtype=torch.float64, state=True):
    """wx, r, bias, and y, c, n, m of a state; leaves, but for m."""
    inputs = slstm_inputs("cpu", dtype, B=B, T=T, H=H, D=D)
    if state:
        of_state = dtype if dtype == torch.float64 else torch.float32
        y, c, n, m = torch.randn(4, B, H, D, dtype=of_state)
        inputs += [0.5 * y, c, 1 + n.square(), m]
    return [each.requires_grad_(index != 6) for index, each in enumerate(inputs)]


def values_and_gradients(function, inputs, resets):
    wx, r, bias, *state = inputs
    y, last = function(wx, r, bias, resets=resets, initial_state=state or None, return_state=True)
    torch.manual_seed(1)
    upstream = [torch.randn(part.shape, dtype=torch.float64).to(part.dtype) for part in (y, *last[:3])]
    return y, *last, *torch.autograd.grad((y, *last[:3]), [x for x in inputs if x.requires_grad], upstream)


def compare(inputs, resets, tolerance):
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = values_and_gradients(definition, exact, resets)
    for found, right in zip(values_and_gradients(batched, inputs, resets), expected, strict=True):
        assert (found - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize(("state", "with_resets"), [(False, False), (True, True)])
def test_any_length(T, state, with_resets):
    torch.manual_seed(0)
    inputs = made(3, T, 2, 5, state=state)
    compare(inputs, some_resets(inputs) if with_resets and T > 31 else None, 1e-12)


@pytest.mark.parametrize("D", [8, 24, 64, 80, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_any_type(dtype, tolerance, D):
    torch.manual_seed(0)
    inputs = made(5, 34, 3 if D < 64 else 1, D, dtype)
    compare(inputs, some_resets(inputs), tolerance)


@pytest.mark.parametrize("reset", [0, 1, 63, 64, 65, 69])
def test_a_reset_hides_what_was_before(reset):
    torch.manual_seed(0)
    inputs = made(2, 70, 1, 4)
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[:, reset] = True
    compare(inputs, resets, 1e-12)
    wx, *_ = inputs
    y = batched(wx, *inputs[1:3], resets=resets, initial_state=inputs[3:])
    before = torch.autograd.grad(y[:, reset:].sum(), (wx, *inputs[3:6]))
    assert before[0][:, :reset].abs().max() == 0 if reset else True
    assert all(each.abs().max() == 0 for each in before[1:])


def test_a_state_of_zeros_with_a_finite_stabilizer_has_gradients():
    """Others begin with m = 0 in place of minus infinity: the values are the same, the state's gradients are not 0."""
    wx, r, bias, y, c, n, m = made(2, 5, 1, 4)
    zeros = [torch.zeros_like(each, requires_grad=True) for each in (y, c, n)]
    inputs = [wx, r, bias, *zeros, torch.zeros_like(m)]
    compare(inputs, None, 1e-12)
    torch.testing.assert_close(batched(*inputs[:3], initial_state=inputs[3:]), batched(*inputs[:3]))
    assert values_and_gradients(batched, inputs, None)[-2].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_halves_are_one_whole(dtype):
    """Also in a 16-bit type, where the y handed on is the one that the loop itself goes on with."""
    torch.manual_seed(0)
    inputs = made(2, 100, 2, 6, dtype)
    resets = some_resets(inputs)

    def in_halves(wx, r, bias, *, resets, initial_state, return_state):
        first, state = batched(
            wx[:, :41], r, bias, resets=resets[:, :41], initial_state=initial_state, return_state=return_state
        )
        second, state = batched(
            wx[:, 41:], r, bias, resets=resets[:, 41:], initial_state=state, return_state=return_state
        )
        return torch.cat((first, second), 1), state

    whole, halves = (values_and_gradients(each, inputs, resets) for each in (batched, in_halves))
    for index, (found, right) in enumerate(zip(halves, whole, strict=True)):
        if index < 5:
            assert torch.equal(found, right)
        else:
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            assert (found - right).abs().max() <= tolerance * right.abs().max()


def test_any_strides():
    torch.manual_seed(0)
    inputs = made(2, 9, 3, 4, state=False)
    expected = values_and_gradients(batched, inputs, None)
    wx, *rest = inputs
    for order in ((3, 2, 0, 1, 4), (4, 0, 1, 2, 3)):
        back = [order.index(axis) for axis in range(5)]
        other = wx.detach().permute(order).contiguous().permute(back).requires_grad_()
        assert not other.is_contiguous()
        for found, right in zip(values_and_gradients(batched, [other, *rest], None), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_weights_in_float32_beside_inputs_in_bfloat16_get_gradients_in_float32():
    torch.manual_seed(0)
    wx, r, bias = made(2, 20, 2, 8, torch.float32, state=False)
    rounded = wx.detach().bfloat16().requires_grad_()
    y = batched(rounded, r, bias)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), (rounded, r, bias))
    assert [each.dtype for each in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    assert (gradients[1].bfloat16().float() != gradients[1]).any(), "they have more digits than bfloat16"


def test_stays_whole_under_compile_and_in_activation_checkpointing():
    torch.manual_seed(0)
    inputs = made(2, 70, 2, 4, torch.float32)
    resets = some_resets(inputs)

    def function(*inputs):
        y, last = batched(*inputs[:3], resets=resets, initial_state=inputs[3:], return_state=True)
        return y.square().sum() + last[0].sum() + (last[1] * last[2]).sum()

    leaves = inputs[:6]
    expected = torch.autograd.grad(function(*inputs), leaves)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    rebuilt = functools.partial(checkpoint, function, use_reentrant=False)
    for wrapped in (compiled, rebuilt):
        for found, right in zip(torch.autograd.grad(wrapped(*inputs), leaves), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operators_are_what_they_say(dtype):
    """Types, shapes and strides of what they return, known without running them."""
    torch.manual_seed(0)
    wx, r, bias, y, c, n, m = made(2, 66, 3, 4, dtype)
    resets = torch.zeros(2, 66, dtype=torch.bool)
    bias = bias.detach().to(c.dtype).requires_grad_()
    inputs = (wx, r, bias, resets, y, c, n, m, "batched")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused.forward.operator, inputs, test_utils=checks)
    out, checkpoints, *_ = (each.detach() for each in fused.forward(*inputs))
    of_backward = (wx, r, bias, resets, y, out, checkpoints, out, y, c, n, "batched")
    of_backward = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in of_backward)
    torch.library.opcheck(fused.backward.operator, of_backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["batched", "compiled"])
def test_autocast_does_not_reach_the_products(backend):
    torch.manual_seed(0)
    inputs = made(2, 20, 2, 8, torch.float32)
    function = functools.partial(slstm, backend=backend)
    expected = values_and_gradients(function, inputs, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(function, inputs, None)
    assert all(map(torch.equal, found, expected))


def test_a_graph_is_captured_on_the_stream_that_warmed_up(monkeypatch):
    """With stand-ins for the GPU's streams and graphs."""
    side, now = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
    entered = []

    @contextlib.contextmanager
    def on(*graph, stream, **options):
        entered.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream=stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", on)
    ran = []
    cuda_graphs._capture(lambda *own: ran.append(entered[-1]), (None, torch.ones(2)), (torch.ones(2),))
    assert ran == [side, side]


def test_no_gradients_of_gradients():
    wx, r, bias = made(1, 3, 1, 2, state=False)
    (gradient,) = torch.autograd.grad(batched(wx, r, bias).sum(), wx, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "cluster"])
def test_a_backend_for_gpus_is_refused_on_a_cpu_with_its_reason(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot compute this: .*GPU.*; choose 'auto'"):
        slstm(*slstm_inputs("cpu", torch.float32), backend=backend)


batched_loops = functools.partial(fused.slstm_fused, backend="batched")


@pytest.fixture
def pretended_gpu(monkeypatch, fresh_choices):
    """The CPU as a GPU: every backend for GPUs is `batched`, accepts everything, and is checked."""
    announce_once.cache_clear()
    loops = SimpleNamespace(rows=lambda B, *_: 8 if B < 100 else 16, why_not=lambda *_: None)
    monkeypatch.setattr(operation, "loops_of", lambda name: loops)
    for name in ("triton", "cluster", "batched"):
        changes = {"devices": ("cpu",), "package": None, "checked_on": ("cpu",), "limits": None, "arguments": {}}
        replace_backend(monkeypatch, SLSTM, name, batched_loops, **changes)


def chosen(dtype=torch.float32, B=3):
    return choose(SLSTM, make_call(torch.device("cpu"), dtype, {"B": B, "H": 2, "D": 8}))


def without_compiled(monkeypatch):
    replace_backend(monkeypatch, SLSTM, "compiled", devices=())


@pytest.mark.usefixtures("pretended_gpu")
def test_the_fastest_that_takes_the_heads_is_chosen(monkeypatch, caplog):
    without_compiled(monkeypatch)
    assert chosen().backend == "triton"
    replace_backend(monkeypatch, SLSTM, "triton", limits=lambda call: "too large")
    assert chosen(torch.bfloat16).backend == "cluster"
    assert not caplog.text
    replace_backend(monkeypatch, SLSTM, "cluster", limits=lambda call: "too large")
    choice = chosen(torch.float16)
    assert choice.backend == "batched" and dict(choice.passed_over)["triton"] == "too large"
    assert "(`batched`), which is slower, on cpu, torch.float16, B 3, D 8, H 2" in caplog.text
    assert "`triton`: too large; `cluster`: too large" in caplog.text


@pytest.mark.usefixtures("pretended_gpu")
def test_kernels_that_are_wrong_or_do_not_run_are_not_chosen(monkeypatch, caplog):
    without_compiled(monkeypatch)

    def wrong(wx, r, bias, **options):
        y = batched_loops(wx, r, bias, **options)
        return y + 1e-2 * (bias - bias.detach()).sum()  # in the gradient alone

    def broken(*_, **__):
        raise RuntimeError("ptxas died\nof something")

    replace_backend(monkeypatch, SLSTM, "triton", wrong)
    replace_backend(monkeypatch, SLSTM, "cluster", broken)
    state = torch.random.get_rng_state()
    assert chosen().backend == "batched"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "`triton`: its values or gradients are wrong (error" in caplog.text
    assert "`cluster`: it does not run (ptxas died)" in caplog.text
    replace_backend(monkeypatch, SLSTM, "batched", broken)
    assert chosen().backend == "recurrence"
    assert "step by step in Python (`recurrence`)" in caplog.text


@pytest.mark.usefixtures("pretended_gpu")
def test_kernels_are_checked_with_the_rows_that_they_take_of_the_batch(monkeypatch, caplog):
    def wrong_on_large_batches(wx, r, bias, **options):
        y = batched_loops(wx, r, bias, **options)
        return y if len(wx) < 100 else 1.01 * y

    replace_backend(monkeypatch, SLSTM, "triton", wrong_on_large_batches)
    assert chosen(B=99).backend == "triton"
    assert not caplog.text
    assert chosen(B=100).backend == "cluster"
    assert "the sLSTM runs by `cluster`" in caplog.text and "`triton`: its values or gradients" in caplog.text


def test_the_tolerance_of_the_self_check_is_far_from_what_the_loops_differ_by():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        inputs = slstm_inputs("cpu", dtype, D=64)
        resets = some_resets(inputs)
        found = errors(*(functools.partial(each, resets=resets) for each in (batched, definition)), inputs)
        assert max(found) < tolerance


@pytest.mark.usefixtures("fresh_choices")
def test_a_choice_is_made_once_and_not_traced(monkeypatch):
    made = []
    limits = lambda call: made.append(call)  # a list that torch.compile would otherwise have to follow
    replace_backend(monkeypatch, SLSTM, "compiled", devices=())
    replace_backend(monkeypatch, SLSTM, "batched", limits=limits)
    inputs = slstm_inputs("cpu", torch.float32, T=3)
    function = torch.compile(lambda *inputs: slstm(*inputs) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(function(*inputs), slstm(*inputs, backend="recurrence") + 1)
    slstm(*inputs)
    assert len(made) == 1
