"""Each form of the causal convolution against torch's own, and against each document alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import conv1d, pad
from torch.utils.checkpoint import checkpoint

from tests.ops.mlstm_cases import in_nan
from tests.ops.stand_ins import replace_backend
from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops import conv
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.conv import CONV, shifts
from xlstm_lm.ops.native import load_kernels
from xlstm_lm.ops.operation import verify
from xlstm_lm.ops.selfcheck import compare


@pytest.fixture(autouse=True, scope="module")
def compiled_kernel():
    load_kernels()  # not being able to build it is a failure here, with the reason


@pytest.fixture(params=["torch", "compiled"])
def causal_conv(request):
    return functools.partial(conv.causal_conv, backend=request.param)


def inputs(B, T, D, W, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, D), (D, W), (D,), (B, W - 1, D)]
    return [torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("T", "D"), [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (33, 70), (600, 5)])
@pytest.mark.parametrize("W", [1, 2, 4, 8])
def test_equals_conv1d(causal_conv, T, D, W):
    x, weight, bias, state = inputs(3, T, D, W)
    left_padded = torch.cat((state, x), dim=1).transpose(1, 2)
    expected = conv1d(left_padded, weight[:, None], bias, groups=D).transpose(1, 2)
    actual = causal_conv(x, weight, bias, initial_state_BWD=state)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, weight, bias, state), upstream),
        torch.autograd.grad(expected, (x, weight, bias, state), upstream),
    )


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    x, weight, bias, _ = inputs(5, 9, 4, 4)
    whole = conv.causal_conv(x, weight, bias, backend="torch")
    upstream = torch.randn_like(whole)
    whole_gradients = torch.autograd.grad(whole, (x, weight, bias), upstream)
    monkeypatch.setattr(shifts, "_BLOCK_ELEMENTS", 2 * 9 * 4)
    blocked = conv.causal_conv(x, weight, bias, backend="torch")
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(torch.autograd.grad(blocked, (x, weight, bias), upstream), whole_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "D"), [(1, 1, 3), (2, 33, 64), (3, 100, 70), (2, 600, 17)])
def test_the_compiled_form_reads_and_writes_what_it_should(B, T, D, dtype):
    """Views with odd strides, surrounded by NaN, in the types of training."""
    inputs_ = [in_nan(x.detach().to(dtype).requires_grad_()) for x in inputs(B, T, D, 4)[:3]]
    resets = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.1
    run = functools.partial(conv.causal_conv, resets_BT=resets)
    error = compare(*(functools.partial(run, backend=name) for name in ("compiled", "torch")), inputs_)
    assert error < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.usefixtures("fresh_choices")
def test_what_the_compiled_form_does_not_take_is_left_to_torch_by_name(caplog, monkeypatch):
    announce_once.cache_clear()
    x, weight, bias, _ = inputs(1, 20, 3, 9)
    torch.testing.assert_close(conv.causal_conv(x, weight, bias), conv.causal_conv(x, weight, bias, backend="torch"))
    assert "W 9" in caplog.text and "(`torch`), which is slower" in caplog.text
    replace_backend(
        monkeypatch, CONV, "compiled", lambda x, weight, *others: 1.01 * shifts.conv_shifts(x, weight, *others)
    )
    assert "wrong" in verify(CONV, "compiled", make_call(x.device, x.dtype, {"D": 3, "W": 4}))
    x, weight, bias, _ = inputs(1, 20, 3, 4)
    torch.testing.assert_close(conv.causal_conv(x, weight, bias), conv.causal_conv(x, weight, bias, backend="torch"))
    assert "`compiled`: its values or gradients are wrong" in caplog.text


@pytest.mark.usefixtures("fresh_choices")
def test_a_kernel_may_be_checked_first_inside_activation_checkpointing():
    x, weight, bias, _ = inputs(1, 20, 6, 4)
    y = checkpoint(conv.causal_conv, x, weight, bias, use_reentrant=False)
    found = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(found, torch.autograd.grad(conv.causal_conv(x, weight, bias).sum(), (x, weight, bias)))


@pytest.mark.parametrize("with_state", [False, True])
def test_gradcheck_with_resets(causal_conv, with_state):
    x, weight, bias, state = inputs(2, 7, 3, 4)
    resets = torch.zeros(2, 7, dtype=torch.bool)
    resets[0, [2, 3, 6]] = True
    resets[1, 0] = True

    def function(x, weight, bias, state):
        initial = state if with_state else None
        return causal_conv(x, weight, bias, resets_BT=resets, initial_state_BWD=initial, return_state=True)

    assert torch.autograd.gradcheck(function, (x, weight, bias, state))


def test_packed_documents_equal_each_alone(causal_conv):
    lengths = [5, 1, 2, 9, 3]
    x, weight, bias, state = inputs(1, sum(lengths), 6, 4)
    resets = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets[0, [sum(lengths[:k]) for k in range(len(lengths))]] = True
    # A state that the reset at the first position must hide.
    packed, last = causal_conv(x, weight, bias, resets_BT=resets, initial_state_BWD=state, return_state=True)
    alone = [causal_conv(document, weight, bias, return_state=True) for document in x.split(lengths, dim=1)]
    joined = torch.cat([y for y, _ in alone], dim=1)
    torch.testing.assert_close(packed, joined, rtol=0, atol=1e-14)
    torch.testing.assert_close(last, alone[-1][1], rtol=0, atol=0)
    upstream = torch.randn_like(joined)
    torch.testing.assert_close(
        torch.autograd.grad(packed, (x, weight, bias), upstream, retain_graph=True),
        torch.autograd.grad(joined, (x, weight, bias), upstream),
    )
    assert torch.autograd.grad(packed, state, upstream)[0].abs().max() == 0


def test_a_reset_stops_infinities_only_within_their_document(causal_conv):
    x, weight, _, _ = inputs(1, 4, 2, 3)
    huge = x.detach().clone()
    huge[0, 1] = 1e300
    resets = torch.tensor([[False, False, True, False]])
    packed = causal_conv(huge, weight, resets_BT=resets)
    torch.testing.assert_close(packed[:, 2:], causal_conv(x[:, 2:], weight), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 3, 6, 9])
def test_two_halves_equal_the_whole(causal_conv, cut):
    x, weight, bias, state = inputs(2, 10, 3, 4)
    resets = torch.zeros(2, 10, dtype=torch.bool)
    resets[0, [1, 5]] = True
    parameters = (x, weight, bias, state)
    whole, last = causal_conv(x, weight, bias, resets_BT=resets, initial_state_BWD=state, return_state=True)
    first, between = causal_conv(
        x[:, :cut], weight, bias, resets_BT=resets[:, :cut], initial_state_BWD=state, return_state=True
    )
    second, handed_over = causal_conv(
        x[:, cut:], weight, bias, resets_BT=resets[:, cut:], initial_state_BWD=between, return_state=True
    )
    halves = torch.cat((first, second), dim=1)
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(handed_over, last)
    upstream = (torch.randn_like(whole), torch.randn_like(last))
    torch.testing.assert_close(
        torch.autograd.grad((halves, handed_over), parameters, upstream),
        torch.autograd.grad((whole, last), parameters, upstream),
    )


def test_half_precision_is_summed_in_float32(causal_conv):
    x, weight, bias, _ = inputs(2, 16, 8, 4, dtype=torch.bfloat16)
    actual = causal_conv(x, weight.float(), bias.float())
    assert actual.dtype == torch.bfloat16
    expected = conv1d(pad(x.float().transpose(1, 2), (3, 0)), weight.float()[:, None], bias.float(), groups=8)
    torch.testing.assert_close(actual, expected.transpose(1, 2).to(torch.bfloat16), rtol=0, atol=0)
    assert torch.autograd.grad(actual.float().sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTD": torch.zeros(2, 8)}, r"\(B, T, D\)"),
        ({"weight_DW": torch.zeros(5, 4)}, "D = 3"),
        ({"bias_D": torch.zeros(4)}, r"bias has shape \(4,\)"),
        ({"resets_BT": torch.zeros(2, 8)}, "torch.bool"),
        ({"initial_state_BWD": torch.zeros(2, 4, 3)}, r"expected \(2, 3, 3\)"),
    ],
)
def test_bad_shapes_are_named(causal_conv, change, message):
    arguments = {"x_BTD": torch.zeros(2, 8, 3), "weight_DW": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv(arguments.pop("x_BTD"), arguments.pop("weight_DW"), **arguments)
