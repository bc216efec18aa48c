"""The selective scan's backends, samples to check them on, and cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.backend import Backend, Call, Cost, Sample
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, some_resets


def scan_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 100, E: int = 24, N: int = 16
) -> list[Tensor]:
    """x, dt, a, b, c and a state for the selective scan; dt, a and the state in float32."""
    x, b, c = (torch.randn(B, T, width, device=device, dtype=dtype) for width in (E, N, N))
    dt, a, state = (torch.randn(shape, device=device) for shape in ((B, T, E), (E, N), (B, E, N)))
    return [x, F.softplus(dt - 2), -a.exp(), b, c, state]


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """A sequence from a state; 300 steps let the loops of GPU kernels run through their software pipelines."""
    steps = 300 if call.device.type == "cuda" else 100
    inputs = scan_inputs(call.device, call.dtype, T=steps, E=24, N=call.size("N"))
    yield Sample(inputs, {"resets_BT": some_resets(inputs)}, "recurrence")


def run(backend: Backend, sample: Sample) -> Checked:
    """y and the last state as a function of x, dt, a, b, c and the first state."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *others, state_BEN = inputs
        return backend.loaded(*others, initial_state_BEN=state_BEN, return_state=True, **sample.options)

    return function


def cost(*, B: int, T: int, E: int, N: int, itemsize: int = 2) -> Cost:
    """Nine operations a state; x, dt, b, c read and y written once."""
    return Cost(9 * B * T * E * N, itemsize * B * T * (3 * E + 2 * N))


def kept(*, E: int, N: int, **sizes: int | str) -> float:
    """The states every 32 steps, in float32."""
    del sizes
    return 4 * E * N / 32


SCAN = Operation(
    name="selective scan",
    title="Mamba-1's selective scan",
    subject="x",
    backends=(
        Backend(
            name="mamba_ssm",
            function="xlstm_lm.ops.selective_scan.mamba_ssm:scan_mamba_ssm",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="mamba_ssm",
            exports=lambda call: False,
            checked_on=("cuda",),
            unsuited=lambda call: "a single step is as fast in PyTorch" if call.one_step else None,
        ),
        Backend(
            name="compiled",
            function="xlstm_lm.ops.selective_scan.compiled:scan_compiled",
            devices=("cpu",),
            native=True,
            exports=lambda call: False,
        ),
        Backend(
            name="recurrence",
            function="xlstm_lm.ops.selective_scan.recurrence:scan_recurrence",
            slow="step by step in Python",
        ),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="N",
    examples=({"N": 16},),
)
