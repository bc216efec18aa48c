"""The sLSTM's backends, samples to check them on, and cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.ops.backend import Backend, Call, Cost, Sample, resolve
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import Checked, some_resets


def slstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 70, H: int = 2, D: int = 24
) -> list[Tensor]:
    """wx, r and bias."""
    shapes = ((B, T, 4, H, D), (4, H, D, D), (4, H, D))
    scales = (1.0, D**-0.5, 1.0)
    return [scale * torch.randn(shape, device=device, dtype=dtype) for shape, scale in zip(shapes, scales, strict=True)]


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """Many steps of few rows, and few steps of all rows: kernels compute more rows at a time where there are many.

    300 steps let the loops of GPU kernels run through their software pipelines; those for a CPU have none.
    """
    B, H, D = call.size("B", 2), call.size("H", 2), call.size("D")
    steps = 300 if call.device.type == "cuda" else 70
    for rows, T, heads in ((min(B, 3), steps, min(H, 2)), (B, 6, H)):
        inputs = slstm_inputs(call.device, call.dtype, B=rows, T=T, H=heads, D=D)
        yield Sample(inputs, {"resets_BT": some_resets(inputs)}, "recurrence")


def run(backend: Backend, sample: Sample) -> Checked:
    """y as a function of wx, r and bias."""

    def function(*inputs: Tensor) -> Tensor:
        return backend.loaded(*inputs, **sample.options)

    return function


def cost(*, B: int, T: int, H: int, D: int, itemsize: int = 2) -> Cost:
    """The recurrent products, and 20 for each unit's gates and states; wx and the weights read and y written once."""
    return Cost(B * T * H * (8 * D**2 + 20 * D), itemsize * H * (B * T * 5 * D + 4 * (D**2 + D)))


def kept(*, H: int, D: int, device: str, itemsize: int = 2, **sizes: int) -> float:
    """c, n and m every 32 steps; on a CPU wx and y in float32 where they are narrower."""
    del sizes
    copies = 4 * 5 if device == "cpu" and itemsize < 4 else 0
    return H * D * (4 * 3 / 32 + copies)


def loops_of(name: str) -> Any:
    """The module with the loops of that name."""
    return resolve("xlstm_lm.ops.slstm.fused:loops_of")(name)


def limits(name: str, call: Call) -> str | None:
    """The reason why the loops of that name do not accept a call; None if they do."""
    return loops_of(name).why_not(call.device, call.size("D"), call.dtype)


def same_rows(name: str, call: Call) -> Call:
    """The call with the smallest batch of which the loops compute as many rows at a time."""
    if "B" not in dict(call.sizes):
        return call
    D, rows = call.size("D"), loops_of(name).rows
    wanted = rows(call.size("B"), call.size("H"), D, call.dtype, call.device)
    batches = ((3 * 2**doubled, heads) for doubled in range(16) for heads in (2, 1))
    B, H = next((B, H) for B, H in batches if rows(B, H, D, call.dtype, call.device) == wanted)
    return call._replace(sizes=(("B", B), ("D", D), ("H", H)))


def _loops(name: str, **others: Any) -> Backend:
    return Backend(
        name=name,
        function="xlstm_lm.ops.slstm.fused:slstm_fused",
        arguments={"backend": name},
        exports=lambda call: False,
        limits=lambda call: limits(name, call),
        same_code=lambda call: same_rows(name, call),
        checked_on=("cuda",),
        **others,
    )


STEPS = "as a product and a pointwise kernel a step"
SLSTM = Operation(
    name="slstm",
    title="the sLSTM",
    subject="wx",
    backends=(
        _loops("triton", devices=("cuda",), package="triton"),
        _loops("cluster", devices=("cuda",)),
        Backend(
            name="compiled",
            function="xlstm_lm.ops.slstm.compiled:slstm_compiled",
            devices=("cpu",),
            native=True,
            exports=lambda call: False,
        ),
        _loops("batched", slow=STEPS),
        Backend(
            name="recurrence",
            function="xlstm_lm.ops.slstm.recurrence:slstm_recurrence",
            slow="step by step in Python",
        ),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="D",
    examples=({"B": 2, "H": 2, "D": 24},),
    gpu_examples=(*({"B": 2, "H": 2, "D": D} for D in (64, 128, 256)), {"B": 600, "H": 2, "D": 64}),
)
