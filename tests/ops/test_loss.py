"""The chunked loss against the plain computation that holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xlstm_lm.ops import loss as loss_operators
from xlstm_lm.ops.loss import linear_cross_entropy

INSIDE = {
    each.operator: each.function
    for each in (
        loss_operators._total_loss,
        loss_operators._token_losses,
        loss_operators._token_losses_backward,
    )
}
"""The operations behind each operator, which a mode does not see by itself."""

OPTIONS = [
    {},
    {"soft_cap": 2.0},
    {"z_loss": 0.3},
    {"soft_cap": 2.0, "z_loss": 0.3, "ignore_index": 3},
]


def plain(hidden, weight, targets, soft_cap=None, z_loss=0.0, ignore_index=-100, reduction="mean"):
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)).flatten(0, -2)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    losses = cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1) ** 2
    counted = targets.flatten() != ignore_index
    losses = torch.where(counted, losses, 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (counted.sum() if reduction == "mean" else 1)


def inputs(B=2, T=13, D=6, V=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, 2:5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 26, None])
def test_equals_the_plain_computation(options, reduction, chunk_tokens):
    hidden, weight, targets = inputs()
    targets = targets.clamp(min=0) if "ignore_index" in options else targets
    expected = plain(hidden, weight, targets, reduction=reduction, **options)
    actual = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_tokens=chunk_tokens, **options)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, targets = inputs(T=4)

    def function(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, targets, soft_cap=3.0, z_loss=0.1, chunk_tokens=3, reduction=reduction
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_a_second_backward_gives_the_same_gradients():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_one_gradient_is_wanted(wanted):
    hidden, weight, targets = inputs()
    expected = dict(zip(("hidden", "weight"), torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))))
    leaves = {"hidden": hidden.detach(), "weight": weight.detach()}
    leaves[wanted].requires_grad_()
    loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], targets)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[wanted])[0], expected[wanted])


def test_no_counted_token_is_zero_loss_and_zero_gradient():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.item() == 0.0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, (hidden, weight)))


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor made, and which operations ran."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in INSIDE:
            with self:
                return INSIDE[function](*args)
        result = function(*args, **(kwargs or {}))
        self.operations.append(str(function))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_full_logits_never_exist(reduction):
    hidden, weight, targets = inputs(B=4, T=64, D=8, V=64, dtype=torch.float32)
    with LargestTensor() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, soft_cap=30.0, chunk_tokens=16, reduction=reduction)
        loss.sum().backward()
    largest_needed = max(16 * 64, hidden.numel(), weight.numel())
    assert seen.elements == largest_needed < 4 * 64 * 64 / 4


def test_no_gradient_work_when_none_is_needed():
    hidden, weight, targets = inputs()
    with LargestTensor() as without, torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets)
    with LargestTensor() as with_gradients:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not any("addmm" in name for name in without.operations)
    assert any("addmm" in name for name in with_gradients.operations)
    torch.testing.assert_close(quiet, loss.detach(), rtol=0, atol=0)


def test_bfloat16_takes_the_softmax_in_float32():
    hidden, weight, targets = inputs(T=200, D=32, V=50, dtype=torch.bfloat16)
    expected = plain(hidden, weight, targets, soft_cap=30.0)
    actual = linear_cross_entropy(hidden, weight, targets, soft_cap=30.0, chunk_tokens=7)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    got_hidden, got_weight = torch.autograd.grad(actual, (hidden, weight))
    assert got_hidden.dtype == got_weight.dtype == torch.bfloat16
    exact_inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    exact = torch.autograd.grad(plain(*exact_inputs, targets, soft_cap=30.0), exact_inputs)
    for gradient, reference in zip((got_hidden, got_weight), exact, strict=True):
        assert (gradient.double() - reference).norm() < 0.01 * reference.norm()


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_parameters_own():
    hidden, weight, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets)
    expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [g.dtype for g in torch.autograd.grad(actual, (hidden, weight))] == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "average"}, "unknown reduction 'average'"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"weight_VD": torch.zeros(11, 5)}, r"expected \(V, 6\)"),
        ({"targets_BT": torch.zeros(2, 13)}, "torch.int64"),
        ({"hidden_BTD": torch.zeros(2, 0, 6)}, "at least one token"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, targets = inputs()
    arguments = {"hidden_BTD": hidden, "weight_VD": weight, "targets_BT": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, weight, targets = inputs()
    targets[1, 1] = 11
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)
