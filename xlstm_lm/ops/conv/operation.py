"""The causal convolution's backends, samples to check them on, and cost. A backend convolves from an empty past."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xlstm_lm.ops.backend import Backend, Call, Cost, Sample
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, some_resets


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """Rows of several documents."""
    D, W = call.size("D"), call.size("W")
    shapes = ((2, 70, D), (D, W), (D,))
    inputs = [torch.randn(shape, device=call.device, dtype=call.dtype) for shape in shapes]
    yield Sample(inputs, {"documents_BT": some_resets(inputs).cumsum(1)}, "torch")


def run(backend: Backend, sample: Sample) -> Checked:
    """y as a function of x, weight and bias."""

    def function(*inputs: Tensor) -> Tensor:
        return backend.loaded(*inputs, sample.options["documents_BT"])

    return function


def cost(*, B: int, T: int, D: int, W: int, itemsize: int = 2) -> Cost:
    """One multiply-add a tap; x and the weights read and y written once."""
    return Cost(2 * B * T * D * W, itemsize * (2 * B * T * D + D * W))


def kept(**sizes: int | str) -> float:
    """The number of the document, an int64."""
    del sizes
    return 8.0


CONV = Operation(
    name="convolution",
    title="the causal convolution",
    subject="x",
    backends=(
        Backend(
            name="causal_conv1d",
            function="xlstm_lm.ops.conv.causal_conv1d:conv_causal_conv1d",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="causal_conv1d",
            exports=lambda call: False,
            checked_on=("cuda",),
        ),
        Backend(
            name="compiled",
            function="xlstm_lm.ops.conv.compiled:conv_compiled",
            devices=("cpu",),
            native=True,
            exports=lambda call: False,
            checked_on=("cpu",),
        ),
        Backend(name="torch", function="xlstm_lm.ops.conv.shifts:conv_shifts", slow="in PyTorch"),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="DW",
    examples=({"D": 8, "W": 4},),
)
