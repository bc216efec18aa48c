"""Inputs for the sLSTM and the comparison with its definition, for the tests beside."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.mlstm_cases import in_nan
from xlstm_lm.ops.slstm import slstm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}
"""Allowed error relative to the largest entry of a value or gradient, where gates are of moderate size."""


def small_kernels(tile: int, steps: int, backend: str) -> None:
    """Have a few steps take several checkpoints, and `batched` its Triton kernels, from now on in this process."""
    from xlstm_lm.ops.slstm import batched, fused, triton_loops, triton_pointwise

    for module in (batched, fused, triton_loops, triton_pointwise):
        module.CHECKPOINT_STEPS = steps
    triton_loops.TILES = (tile,)
    triton_loops.LARGEST = dict.fromkeys(triton_loops.LARGEST, 128)
    batched._triton_kernels = lambda _: triton_pointwise if backend == "batched" else None


def errors(
    B: int,
    T: int,
    H: int,
    D: int,
    *,
    backend: str = "triton",
    dtype: torch.dtype = torch.float32,
    state: bool = True,
    resets: tuple[int, ...] = (0, 3),
    scale: float = 1.5,
    input_mean: float = 0.0,
    forget_mean: float = 0.0,
    seed: int = 0,
    tile: int | None = 8,
    steps: int = 4,
    device: str = "cpu",
) -> dict[str, float]:
    """How far each value and gradient is from the definition, relative to the largest entry that it should have.

    Inputs lie in larger tensors full of NaN, which shows an access outside of them. `resets` are steps of the first
    row; `tile` and `steps` those of `small_kernels`, for a process in which Triton interprets; None: as things are.
    """
    if tile is not None:
        small_kernels(tile, steps, backend)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wx": (B, T, 4, H, D), "r": (4, H, D, D), "bias": (4, H, D)}
    if state:
        shapes |= dict.fromkeys("ycnm", (B, H, D))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["wx"] *= scale
    inputs["wx"][:, :, 0] += input_mean
    inputs["wx"][:, :, 1] += forget_mean
    inputs["r"] /= D**0.5
    if state:
        inputs["n"] = 1 + inputs["n"].square()
    of_state = torch.promote_types(dtype, torch.float32)
    dtypes = dict.fromkeys(("wx", "r", "bias"), dtype)
    inputs = {name: x.to(device, dtypes.get(name, of_state)) for name, x in inputs.items()}
    resets_BT = None
    if resets:
        resets_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        resets_BT[0, [step for step in resets if step < T]] = True

    def run(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        initial = tuple(x[name] for name in "ycnm") if state else None
        y, last = slstm(
            x["wx"],
            x["r"],
            x["bias"],
            resets=resets_BT,
            initial_state=initial,
            return_state=True,
            backend=backend,
        )
        outputs = (y, *last[:3])
        leaves = {name: each for name, each in x.items() if name != "m"}
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        values = dict(zip(("out", "last y", "last c", "last n", "last m"), (y, *last), strict=True))
        return values | {f"d{name}": each for name, each in zip(leaves, gradients, strict=True)}

    expected = run("recurrence", {name: x.double().requires_grad_(name != "m") for name, x in inputs.items()})
    found = run(backend, {name: in_nan(x.requires_grad_(name != "m")) for name, x in inputs.items()})
    assert found["out"].dtype == dtype
    return {
        name: float((found[name].double() - x).detach().abs().max() / x.detach().abs().max().clamp_min(1e-30))
        for name, x in expected.items()
    }


def assert_right(found: dict[str, float], tolerance: float) -> None:
    assert all(error <= tolerance for error in found.values()), found  # NaN fails too: nothing is below it
