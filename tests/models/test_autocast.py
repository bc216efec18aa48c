"""Gates, cells and losses stay float32 under torch.autocast."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from tests.models.family_cases import CONFIGS, make_model, make_rows
from xlstm_lm.models.layers import Float32Linear
from xlstm_lm.ops import mlstm, slstm, ssd
from xlstm_lm.ops.selective_scan import selective_scan

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def make_inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def values_and_gradients(function, inputs: list[Tensor], context: contextlib.AbstractContextManager) -> list[Tensor]:
    with context:
        values = function(*inputs)
    values = [value for value in values if value is not None] if isinstance(values, tuple) else [values]
    return [*values, *torch.autograd.grad(sum(value.square().sum() for value in values), inputs)]


def assert_unchanged(function, inputs: list[Tensor]) -> None:
    expected = values_and_gradients(function, inputs, contextlib.nullcontext())
    found = values_and_gradients(function, inputs, AUTOCAST)
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float32_linear():
    layer = Float32Linear(7, 5)
    assert_unchanged(layer, make_inputs((3, 7)))


@pytest.mark.parametrize("backend", ["recurrence", "chunkwise", "compiled"])
def test_mlstm(backend):
    B, T, H, K, V = 2, 11, 2, 4, 6
    inputs = make_inputs((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))
    assert_unchanged(lambda *inputs: mlstm.mlstm(*inputs, backend=backend, chunk_length=4), inputs)


@pytest.mark.parametrize("backend", ["recurrence", "batched", "compiled"])
def test_slstm(backend):
    B, T, H, D = 2, 9, 2, 4
    inputs = make_inputs((B, T, 4, H, D), (4, H, D, D), (4, H, D))
    assert_unchanged(lambda *inputs: slstm.slstm(*inputs, backend=backend), inputs)


@pytest.mark.parametrize("backend", ["recurrence", "compiled"])
def test_selective_scan(backend):
    x, dt, a, b, c = make_inputs((2, 9, 4), (2, 9, 4), (4, 3), (2, 9, 3), (2, 9, 3))
    run = lambda x, dt, a, b, c: selective_scan(x, dt.exp(), -a.exp(), b, c, backend=backend)[0]
    assert_unchanged(run, [x, dt, a, b, c])


@pytest.mark.parametrize("backend", ["recurrence", "mlstm", "chunkwise"])
def test_ssd(backend):
    x, dt, a, b, c = make_inputs((2, 9, 4, 3), (2, 9, 4), (4,), (2, 9, 2, 3), (2, 9, 2, 3))
    run = lambda x, dt, a, b, c: ssd.ssd(x, dt.exp(), -a.exp(), b, c, backend=backend)[0]
    assert_unchanged(run, [x, dt, a, b, c])


@pytest.mark.parametrize("name", [name for name in CONFIGS if "lstm" in name and CONFIGS[name].family == "xlstm"])
def test_gates_of_blocks_are_float32(name):
    """The gates that a block's cell is given, and its state, have all digits though the products around have not."""
    model = make_model(name)
    tokens_BT, resets_BT, _ = make_rows()
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for module in model.modules()
        if isinstance(module, Float32Linear)
    ]
    with AUTOCAST:
        _, states = model(tokens_BT, resets_BT, return_state=True)
    for hook in hooks:
        hook.remove()
    assert all(each.dtype == torch.float32 for each in seen)
    assert bool(seen) == any("mlstm" in kind for kind in model.config.block_kinds())
    cells = [part for state in states for part in state if part.dtype == torch.float32]
    assert len(cells) >= 3 * len(states)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_training_under_autocast_is_near_one_without(name):
    model = make_model(name)
    tokens_BT, resets_BT, targets_BT = make_rows()

    def step(context: contextlib.AbstractContextManager) -> tuple[Tensor, list[Tensor]]:
        with context:
            loss = model.loss(model(tokens_BT, resets_BT), targets_BT, reduction="mean")
        assert loss.dtype == torch.float32
        return loss, torch.autograd.grad(loss, list(nn.Module.parameters(model)))

    (exact, exact_gradients), (rough, rough_gradients) = step(contextlib.nullcontext()), step(AUTOCAST)
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)
    for found, expected in zip(rough_gradients, exact_gradients, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 0.1 * expected.norm() + 1e-3
