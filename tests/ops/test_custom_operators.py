"""Every operator keeps the rules by which PyTorch compiles, traces and differentiates it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from xlstm_lm.ops import document_rnn as rnn
from xlstm_lm.ops import loss, native
from xlstm_lm.ops.compiling import custom_operator
from xlstm_lm.ops.conv import shifts
from xlstm_lm.ops.mlstm import chunkwise
from xlstm_lm.ops.slstm import fused

B, T, H, K, V = 2, 21, 2, 3, 5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) + 0.1).to(dtype).requires_grad_()


def make_resets() -> Tensor:
    resets_BT = torch.zeros(B, T, dtype=torch.bool)
    resets_BT[0, [0, 3, 4, 15]] = True
    return resets_BT


def mlstm_inputs(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))
    return [random(*shape, dtype=dtype) for shape in shapes]


def mlstm(dtype: torch.dtype, with_state: bool) -> tuple:
    state_dtype = torch.promote_types(dtype, torch.float32)
    state = [random(*shape, dtype=state_dtype) for shape in ((B, H, K, V), (B, H, K), (B, H))]
    state[2] = state[2].detach()
    resets, state = (make_resets(), state) if with_state else (None, [None] * 3)
    return *mlstm_inputs(dtype), resets, *state, with_state, True, not with_state, with_state, 1e-6, 4


def mlstm_chunkwise(dtype: torch.dtype, with_state: bool) -> tuple:
    """Inputs in chunks of one step, which make several blocks."""
    *tensors, _, _, _, _, _, _ = mlstm(dtype, with_state)
    return *tensors, True, 1, "exp" if with_state else "sigmoid", with_state, 1e-6, with_state


def slstm(dtype: torch.dtype, with_state: bool) -> tuple:
    y, c, m = (random(B, H, K, dtype=dtype) for _ in range(3))
    state = (y, c, positive(B, H, K, dtype=dtype), m.detach()) if with_state else (None,) * 4
    weights = random(4, H, K, K, dtype=dtype), random(4, H, K, dtype=dtype)
    return random(B, T, 4, H, K, dtype=dtype), *weights, make_resets() if with_state else None, *state, True


def slstm_fused(dtype: torch.dtype, with_state: bool) -> tuple:
    wx, r, bias, resets, *state, _ = slstm(dtype, True)
    return wx, r, bias, resets if with_state else None, *state, "batched"


def conv(dtype: torch.dtype, with_state: bool) -> tuple:
    compute = torch.promote_types(dtype, torch.float32)
    bias, documents = (random(K, dtype=compute), make_resets().cumsum(1)) if with_state else (None, None)
    return random(B, T, K, dtype=dtype), random(4, K, dtype=compute), bias, documents


def conv_shifts(dtype: torch.dtype, with_state: bool) -> tuple:
    x, taps, bias, documents = conv(dtype, with_state)
    return x, taps.detach().t().requires_grad_(), bias, documents


def scan(dtype: torch.dtype, with_state: bool) -> tuple:
    compute = torch.promote_types(dtype, torch.float32)
    decay = (-positive(K, V, dtype=compute)).detach().requires_grad_()
    shared = random(B, T, V, dtype=dtype), random(B, T, V, dtype=dtype)
    resets, state = (make_resets(), random(B, K, V, dtype=compute)) if with_state else (None, None)
    return random(B, T, K, dtype=dtype), positive(B, T, K, dtype=compute), decay, *shared, resets, state, True


def gated_delta(dtype: torch.dtype, with_state: bool) -> tuple:
    compute = torch.promote_types(dtype, torch.float32)
    log_decay = (-positive(B, T, H, dtype=compute)).detach().requires_grad_()
    tensors = *mlstm_inputs(dtype)[:3], log_decay, positive(B, T, H, dtype=compute)
    state = random(B, H, K, V, dtype=compute) if with_state else torch.zeros(B, H, K, V, dtype=compute)
    return *tensors, make_resets() if with_state else None, state, True


def total_loss(dtype: torch.dtype, with_state: bool) -> tuple:
    return *token_losses(dtype, with_state), with_state, True, True


def token_losses(dtype: torch.dtype, with_state: bool) -> tuple:
    targets_N = torch.randint(0, V, (T,))
    targets_N[3] = -100
    options = (2.0, 0.1) if with_state else (None, 0.0)
    return random(T, K, dtype=dtype), random(V, K, dtype=dtype), targets_N, *options, -100, 8, dtype


def document_rnn(dtype: torch.dtype, with_state: bool) -> tuple:
    cell, gates = ("lstm", 4) if with_state else ("gru", 3)
    state = random(B, K, dtype=dtype), random(B, K, dtype=dtype) if with_state else None
    weights = (random(gates * K, width, dtype=dtype) for width in (V, K))
    return random(B, T, V, dtype=dtype), make_resets(), *state, *weights, random(gates * K, dtype=dtype), cell


HALF = (torch.float32, torch.float64, torch.bfloat16)
WHOLE = (torch.float32, torch.float64)
OPERATORS = {
    "mlstm": (lambda: torch.ops.xlstm_lm.mlstm_forward.default, mlstm, HALF),
    "mlstm_chunkwise": (lambda: chunkwise.forward.operator, mlstm_chunkwise, HALF),
    "slstm": (lambda: torch.ops.xlstm_lm.slstm_forward.default, slstm, WHOLE),
    "slstm_fused": (lambda: fused.forward.operator, slstm_fused, WHOLE),
    "conv": (lambda: torch.ops.xlstm_lm.conv_forward.default, conv, HALF),
    "conv_shifts": (lambda: shifts.forward.operator, conv_shifts, HALF),
    "scan": (lambda: torch.ops.xlstm_lm.scan_forward.default, scan, HALF),
    "gated_delta": (lambda: torch.ops.xlstm_lm.gated_delta_forward.default, gated_delta, HALF),
    "document_rnn": (lambda: rnn.document_rnn.operator, document_rnn, WHOLE),
    "total_loss": (lambda: loss._total_loss.operator, total_loss, HALF),
    "token_losses": (lambda: loss._token_losses.operator, token_losses, HALF),
}
"""How to find an operator, its arguments with all there may be and with what there must be, and its types."""


@pytest.mark.parametrize("with_state", [True, False], ids=["all", "least"])
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, (_, _, dtypes) in OPERATORS.items() for dtype in dtypes]
)
def test_opcheck(name: str, dtype: torch.dtype, with_state: bool) -> None:
    """Schema, shapes without content, and gradients; in eager mode and traced with symbolic shapes."""
    native.load_kernels()
    torch.manual_seed(0)
    operator, make_inputs, _ = OPERATORS[name]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(operator(), make_inputs(dtype, with_state), **tolerance)


def test_a_copy_of_an_operator_keeps_its_own_function() -> None:
    """An exported model brings sources of its own, beside those of the package."""

    def make(factor: int):
        def times(x: Tensor) -> Tensor:
            return factor * x

        return custom_operator("times_for_a_test", times, torch.empty_like)

    doubled, tripled = make(2), make(3)
    assert doubled.operator.name() != tripled.operator.name()
    assert doubled(torch.ones(())) == 2 and tripled(torch.ones(())) == 3


def test_an_operator_is_differentiable_once() -> None:
    hidden, weight, targets = token_losses(torch.float64, False)[:3]
    loss_sum = loss.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss_sum.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_step_does_not_import_dynamo() -> None:
    """It takes a second or two, and most programs never compile."""
    step = """
import sys, torch
from xlstm_lm.models import XLSTMConfig, build_model
pattern = ["mlstm", "slstm", "mlstm_paper"]
model = build_model(XLSTMConfig(vocab_size=9, embedding_dim=16, num_heads=2, num_blocks=3, pattern=pattern))
tokens = torch.zeros(1, 4, dtype=torch.int64)
model.loss(model(tokens), tokens).backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", step], check=True)
