"""The loss as an operation: its one backend, samples to check it on, and cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.backend import Backend, Call, Cost, Sample
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import Checked


def all_logits(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, soft_cap: float, **_: int) -> Tensor:
    """The mean cross entropy from all logits at once: the definition."""
    logits_BTV = soft_cap * torch.tanh(hidden_BTD @ weight_VD.T / soft_cap)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """Several chunks of tokens under a soft cap."""
    shapes = ((2, 40, 16), (50, 16))
    inputs = [torch.randn(shape, device=call.device, dtype=call.dtype) for shape in shapes]
    targets_BT = torch.randint(0, 50, (2, 40), device=call.device)
    yield Sample(inputs, {"targets_BT": targets_BT, "soft_cap": 30.0, "chunk_tokens": 16}, "all_logits")


def run(backend: Backend, sample: Sample) -> Checked:
    """The loss as a function of hidden states and the head's weight."""

    def function(*inputs: Tensor) -> Tensor:
        return backend.loaded(*inputs, **sample.options)

    return function


def cost(*, B: int, T: int, D: int, V: int, itemsize: int = 2) -> Cost:
    """The product with the head; hidden states, weight and logits (float32) moved once."""
    return Cost(2 * B * T * D * V, itemsize * D * (B * T + V) + 4 * B * T * V)


LOSS = Operation(
    name="loss",
    title="the loss",
    subject="hidden",
    backends=(
        Backend(name="chunked", function="xlstm_lm.ops.loss:linear_cross_entropy"),
        Backend(name="all_logits", function="xlstm_lm.ops.loss_operation:all_logits"),
    ),
    samples=samples,
    run=run,
    cost=cost,
)
