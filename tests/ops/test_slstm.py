"""Every sLSTM backend against the `xlstm` package's cell, numerical gradients, and its own promises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.native import load_kernels
from xlstm_lm.ops.operation import choose
from xlstm_lm.ops.slstm import SLSTM, slstm

BACKEND_NAMES = pytest.mark.parametrize("backend", ["recurrence", "compiled", "batched"])


@pytest.fixture(autouse=True, scope="module")
def compiled_kernel():
    load_kernels()  # not being able to build it is a failure here, with the reason


def inputs(B, T, H, D, *, dtype=torch.float64, seed=0, state=False, scale=1.5):
    """wx, r, bias and, on request, a state as a longer run would have left it: (y, c, n) and the constant m."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    tensors = [scale * draw(B, T, 4, H, D), draw(4, H, D, D) / D**0.5, draw(4, H, D)]
    if state:
        tensors += [0.5 * draw(B, H, D), draw(B, H, D), 1 + draw(B, H, D).square()]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return (*tensors, draw(B, H, D).to(dtype)) if state else tuple(tensors)


def some_resets(B, T, seed=0):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.15


def true_units(y, state):
    """Outputs that do not depend on the stabilizer: cell and normalizer with their e^m."""
    last_y, c, n, m = state
    return y, last_y, c * m.exp(), n * m.exp()


@BACKEND_NAMES
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 7, 1, 4), (3, 40, 4, 8), (1, 65, 2, 17)])
def test_equals_the_cell_of_the_xlstm_package(backend, B, T, H, D):
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    config = sLSTMCellConfig(hidden_size=H * D, num_heads=H, backend="vanilla", dtype="float32")
    cell = sLSTMCell(config).double()
    wx, r, bias = inputs(B, T, H, D)
    with torch.no_grad():
        cell._recurrent_kernel_.copy_(r.permute(1, 0, 3, 2).reshape(H, 4 * D, D))
        cell._bias_.copy_(bias.flatten())
    expected, _ = cell(wx.flatten(2))
    expected = expected.transpose(1, 2)
    actual = slstm(wx, r, bias, backend=backend)
    torch.testing.assert_close(actual, expected)

    upstream = torch.randn_like(expected)
    expected_wx, expected_r, expected_bias = torch.autograd.grad(
        expected, (wx, cell._recurrent_kernel_, cell._bias_), upstream
    )
    actual_wx, actual_r, actual_bias = torch.autograd.grad(actual, (wx, r, bias), upstream)
    torch.testing.assert_close(actual_wx, expected_wx)
    torch.testing.assert_close(actual_r, expected_r.view(H, 4, D, D).permute(1, 0, 3, 2))
    torch.testing.assert_close(actual_bias, expected_bias.view(4, H, D))


@BACKEND_NAMES
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 1), (2, 5, 2, 3), (3, 4, 1, 2)])
def test_gradcheck(backend, B, T, H, D, with_state):
    *parameters, m = inputs(B, T, H, D, state=True)
    resets = some_resets(B, T)

    def function(wx, r, bias, y, c, n):
        initial = (y, c, n, m) if with_state else None
        return true_units(*slstm(wx, r, bias, resets=resets, initial_state=initial, return_state=True, backend=backend))

    assert torch.autograd.gradcheck(function, parameters)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(1, 1, 2, 16), (8, 33, 2, 64), (5, 31, 3, 20), (1, 100, 1, 40), (17, 64, 1, 7), (2, 70, 2, 100)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_compiled_equals_the_definition(dtype, tolerance, B, T, H, D, with_state):
    *parameters, m = inputs(B, T, H, D, dtype=dtype, state=True)
    exact_parameters = [parameter.detach().double().requires_grad_() for parameter in parameters]
    resets = some_resets(B, T)

    def run(backend, wx, r, bias, y, c, n):
        initial = (y, c, n, m.to(wx.dtype)) if with_state else None
        y, state = slstm(wx, r, bias, resets=resets, initial_state=initial, return_state=True, backend=backend)
        return y, *state

    actual, expected = run("compiled", *parameters), run("recurrence", *exact_parameters)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in expected[:4]]
    actual += torch.autograd.grad(
        actual[:4], parameters, [part.to(dtype) for part in upstream], allow_unused=True, materialize_grads=True
    )
    expected += torch.autograd.grad(expected[:4], exact_parameters, upstream, allow_unused=True, materialize_grads=True)
    for part, exact in zip(actual, expected, strict=True):
        assert part.dtype == dtype
        assert (part - exact).norm() <= tolerance * exact.norm()


@BACKEND_NAMES
def test_packed_documents_equal_each_alone(backend):
    lengths = [5, 1, 40, 9, 33]
    wx, r, bias, *state = inputs(1, sum(lengths), 2, 6, state=True)
    resets = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets[0, [sum(lengths[:k]) for k in range(len(lengths))]] = True
    # A state that the reset at the first position must hide.
    packed, last = slstm(wx, r, bias, resets=resets, initial_state=state, return_state=True, backend=backend)
    alone = [slstm(part, r, bias, return_state=True, backend=backend) for part in wx.split(lengths, dim=1)]
    joined = torch.cat([y for y, _ in alone], dim=1)
    torch.testing.assert_close(packed, joined, rtol=0, atol=1e-14)
    torch.testing.assert_close(last, alone[-1][1], rtol=0, atol=1e-14)

    upstream = (torch.randn_like(joined), *(torch.randn_like(part) for part in last[:3]))
    torch.testing.assert_close(
        torch.autograd.grad((packed, *last[:3]), (wx, r, bias), upstream, retain_graph=True),
        torch.autograd.grad((joined, *alone[-1][1][:3]), (wx, r, bias), upstream),
    )
    hidden = torch.autograd.grad((packed, *last[:3]), state[:3], upstream)
    assert all(gradient.abs().max() == 0 for gradient in hidden)


@BACKEND_NAMES
@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_two_halves_equal_the_whole(backend, cut):
    wx, r, bias, *state = inputs(2, 70, 2, 5, state=True)
    resets = some_resets(2, 70)
    whole, last = slstm(wx, r, bias, resets=resets, initial_state=state, return_state=True, backend=backend)
    first, between = slstm(
        wx[:, :cut], r, bias, resets=resets[:, :cut], initial_state=state, return_state=True, backend=backend
    )
    second, handed_over = slstm(
        wx[:, cut:], r, bias, resets=resets[:, cut:], initial_state=between, return_state=True, backend=backend
    )
    halves = torch.cat((first, second), dim=1)
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(handed_over, last)
    upstream = (torch.randn_like(whole), *(torch.randn_like(part) for part in last[:3]))
    inputs_ = (wx, r, bias, *state[:3])
    torch.testing.assert_close(
        torch.autograd.grad((halves, *handed_over[:3]), inputs_, upstream),
        torch.autograd.grad((whole, *last[:3]), inputs_, upstream),
    )


def test_step_by_step_without_gradients_equals_the_whole():
    wx, r, bias = (tensor.detach() for tensor in inputs(3, 20, 2, 16, dtype=torch.float32))
    whole = slstm(wx, r, bias)
    state, outputs = None, []
    for t in range(wx.shape[1]):
        y, state = slstm(wx[:, t : t + 1], r, bias, initial_state=state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize("level", [-300.0, -90.0, -20.0, 20.0, 90.0, 300.0])
@pytest.mark.parametrize("gate", range(4))
def test_compiled_at_extreme_gates(gate, level):
    wx, r, bias = inputs(2, 40, 1, 16, dtype=torch.float32)
    wx = wx.detach().clone()
    wx[:, 10:20, gate] += level
    wx.requires_grad_()
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (wx, r, bias)]
    actual, expected = slstm(wx, r, bias, backend="compiled"), slstm(*exact_inputs, backend="recurrence")
    assert (actual - expected).norm() <= 1e-4 * expected.norm()  # a gate near 300 is itself rounded by 1.5e-5
    actual_gradients = torch.autograd.grad(actual.sum(), (wx, r, bias))
    for gradient, exact in zip(actual_gradients, torch.autograd.grad(expected.sum(), exact_inputs), strict=True):
        assert (gradient - exact).norm() <= 1e-4 * exact.norm()


def test_compiled_takes_any_strides():
    wx, r, bias = inputs(2, 9, 3, 4)
    expected = slstm(wx, r, bias, backend="recurrence")
    laid_out_otherwise = [
        wx.permute(3, 2, 0, 1, 4).contiguous().permute(2, 3, 1, 0, 4),
        wx.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0),
    ]
    for other in laid_out_otherwise:
        assert not other.is_contiguous()
        torch.testing.assert_close(slstm(other, r, bias, backend="compiled"), expected)


@pytest.mark.parametrize("backend", ["recurrence", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_float32(backend, dtype):
    wx, r, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs(2, 40, 2, 8))
    y, state = slstm(wx, r, bias, return_state=True, backend=backend)
    assert y.dtype == dtype
    assert all(part.dtype == torch.float32 for part in state)
    full = [tensor.detach().float().requires_grad_() for tensor in (wx, r, bias)]
    expected = slstm(*full, backend=backend)
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
    gradients = torch.autograd.grad(y.sum(), (wx, r, bias))
    expected_gradients = torch.autograd.grad(expected.sum(), full)
    torch.testing.assert_close(gradients, tuple(gradient.to(dtype) for gradient in expected_gradients))


@BACKEND_NAMES
def test_works_under_activation_checkpointing(backend):
    parameters = inputs(2, 40, 2, 8)

    def run(wx, r, bias):
        return slstm(wx, r, bias, backend=backend)

    plain = torch.autograd.grad(run(*parameters).square().sum(), parameters)
    rerun = checkpoint(run, *parameters, use_reentrant=False).square().sum()
    torch.testing.assert_close(torch.autograd.grad(rerun, parameters), plain, rtol=0, atol=0)


@BACKEND_NAMES
def test_a_nan_is_seen_from_its_step_on_and_in_its_row_and_head_only(backend):
    wx, r, bias = (tensor.detach() for tensor in inputs(2, 12, 2, 4, dtype=torch.float32))
    wx[1, 5, 0, 1, 2] = torch.nan
    y = slstm(wx, r, bias, backend=backend)
    assert y[1, 6:, 1].isnan().all()
    assert y[0].isfinite().all() and y[1, :5].isfinite().all() and y[1, :, 0].isfinite().all()


def test_compiled_leaves_the_treatment_of_denormals_as_it_was():
    tiny = torch.tensor([1e-40])
    slstm(*(tensor.detach() for tensor in inputs(1, 3, 1, 4, dtype=torch.float32)), backend="compiled")
    assert (tiny * 1.0).item() > 0


def test_compiled_does_not_depend_on_the_number_of_threads():
    parameters = inputs(9, 40, 3, 8)

    def values_and_gradients(threads):
        torch.set_num_threads(threads)
        y = slstm(*parameters, backend="compiled")
        return y, *torch.autograd.grad(y.sum(), parameters)

    before = torch.get_num_threads()
    try:
        torch.testing.assert_close(values_and_gradients(4), values_and_gradients(1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wx": torch.zeros(2, 5, 3, 2, 4)}, r"wx has shape \(2, 5, 3, 2, 4\); expected \(B, T, 4, H, D\)"),
        ({"wx": torch.zeros(2, 0, 4, 2, 4)}, "at least 1"),
        ({"wx": torch.zeros(2, 5, 4, 2, 4, dtype=torch.int64)}, "floating-point"),
        ({"r": torch.zeros(4, 2, 4, 3)}, r"r has shape \(4, 2, 4, 3\); expected \(4, 2, 4, 4\)"),
        ({"bias": torch.zeros(4, 8)}, r"bias has shape \(4, 8\)"),
        ({"resets": torch.zeros(2, 5)}, "torch.bool"),
        ({"resets": torch.zeros(2, 6, dtype=torch.bool)}, r"resets has shape \(2, 6\)"),
        ({"initial_state": (torch.zeros(2, 2, 4),) * 3}, "3 tensors"),
        ({"initial_state": (torch.zeros(2, 2, 5),) * 4}, r"initial_state y has shape \(2, 2, 5\)"),
        ({"bias": torch.zeros(4, 2, 4, device="meta")}, "bias is on meta"),
        ({"backend": "cuda"}, "unknown slstm backend 'cuda'.*'compiled', 'batched', 'recurrence'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"wx": torch.zeros(2, 5, 4, 2, 4), "r": torch.zeros(4, 2, 4, 4), "bias": torch.zeros(4, 2, 4)} | change
    with pytest.raises(ValueError, match=message):
        slstm(arguments.pop("wx"), arguments.pop("r"), arguments.pop("bias"), **arguments)


def test_compiled_refuses_another_device():
    wx, r, bias = (torch.zeros(shape, device="meta") for shape in ((1, 2, 4, 1, 3), (4, 1, 3, 3), (4, 1, 3)))
    with pytest.raises(ValueError, match="takes CPU tensors, but wx is on meta"):
        slstm(wx, r, bias, backend="compiled")


@pytest.mark.usefixtures("fresh_choices")
def test_auto_is_compiled_on_a_cpu_and_says_so_where_it_is_slow(caplog):
    announce_once.cache_clear()
    assert choose(SLSTM, make_call(torch.device("cpu"), torch.float32, {"D": 3})).backend == "compiled"
    assert not caplog.messages
    choice = choose(SLSTM, make_call(torch.device("xpu"), torch.float32, {"D": 3}))
    assert choice.backend == "batched" and dict(choice.passed_over)["triton"].startswith("it takes GPU tensors")
    assert "(`batched`), which is slower, on xpu" in caplog.text and "no faster backend for xpu" in caplog.text
