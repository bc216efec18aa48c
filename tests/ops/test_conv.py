"""The causal convolution against torch's own, and against each document alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, pad

from xlstm_lm.ops import conv
from xlstm_lm.ops.conv import causal_conv


def inputs(B, T, D, W, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, D), (D, W), (D,), (B, W - 1, D)]
    return [torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_equals_conv1d(T, W):
    x, weight, bias, state = inputs(3, T, 5, W)
    left_padded = torch.cat((state, x), dim=1).transpose(1, 2)
    expected = conv1d(left_padded, weight[:, None], bias, groups=5).transpose(1, 2)
    actual = causal_conv(x, weight, bias, initial_state_BWD=state)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, weight, bias, state), upstream),
        torch.autograd.grad(expected, (x, weight, bias, state), upstream),
    )


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    x, weight, bias, _ = inputs(5, 9, 4, 4)
    whole = causal_conv(x, weight, bias)
    upstream = torch.randn_like(whole)
    whole_gradients = torch.autograd.grad(whole, (x, weight, bias), upstream)
    monkeypatch.setattr(conv, "_BLOCK_ELEMENTS", 2 * 9 * 4)
    blocked = causal_conv(x, weight, bias)
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(torch.autograd.grad(blocked, (x, weight, bias), upstream), whole_gradients)


@pytest.mark.parametrize("with_state", [False, True])
def test_gradcheck_with_resets(with_state):
    x, weight, bias, state = inputs(2, 7, 3, 4)
    resets = torch.zeros(2, 7, dtype=torch.bool)
    resets[0, [2, 3, 6]] = True
    resets[1, 0] = True

    def function(x, weight, bias, state):
        initial = state if with_state else None
        return causal_conv(x, weight, bias, resets_BT=resets, initial_state_BWD=initial, return_state=True)

    assert torch.autograd.gradcheck(function, (x, weight, bias, state))


def test_packed_documents_equal_each_alone():
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


def test_a_reset_stops_infinities_only_within_their_document():
    x, weight, _, _ = inputs(1, 4, 2, 3)
    huge = x.detach().clone()
    huge[0, 1] = 1e300
    resets = torch.tensor([[False, False, True, False]])
    packed = causal_conv(huge, weight, resets_BT=resets)
    torch.testing.assert_close(packed[:, 2:], causal_conv(x[:, 2:], weight), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 3, 6, 9])
def test_two_halves_equal_the_whole(cut):
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


def test_half_precision_is_summed_in_float32():
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
def test_bad_shapes_are_named(change, message):
    arguments = {"x_BTD": torch.zeros(2, 8, 3), "weight_DW": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv(arguments.pop("x_BTD"), arguments.pop("weight_DW"), **arguments)
