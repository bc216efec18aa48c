"""Whether a function computes what its definition says, values and gradients; and small inputs to ask it with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a kernel may be from its definition, of the largest entry of a value or gradient."""

Function = TypeVar("Function", bound=Callable)


def asked_once(function: Function) -> Function:
    """`function`, a question about this machine, with its answers kept: asked once a process for each arguments.

    Also where torch.compile traces the caller. (It would follow a function with `functools.cache` around it inside.)
    """
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def ask(*arguments: object) -> object:
        return cached(*arguments)

    return ask


def what_is_wrong(
    prepare: Callable[[], tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]],
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = True,
) -> tuple[str, str] | None:
    """How kernels fail on a device: "do not run" or "are wrong", and the reason; None if they compute the definition.

    `prepare` gives them, their definition and the inputs to compare them on. Neither the random state nor the mode of
    autograd that the caller is in makes a difference, or changes.
    """
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(0)
        try:
            error = compare(*prepare(), gradients=gradients)
        except Exception as caught:  # whatever a compiler, an assembler or a driver comes up with
            return "do not run", (str(caught).strip() or type(caught).__name__).splitlines()[0]
    return None if error <= TOLERANCE.get(dtype, 1e-9) else ("are wrong", f"error {error:.1e}")


def compare(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], gradients: bool = True
) -> float:
    """Largest error of the value and, by default, of every gradient of `function` against `definition` in float64.

    Each is relative to the largest entry of what it should be; infinite where anything is not finite.
    """
    return max(errors(function, definition, inputs, gradients))


def errors(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], gradients: bool = True
) -> tuple[float, float]:
    """As `compare`, apart: the error of the value, and the largest of the gradients (0 where none was asked for)."""
    leaves = [each.detach().requires_grad_(gradients) for each in inputs]
    exact_leaves = [each.detach().double().requires_grad_(gradients) for each in inputs]
    value, exact = function(*leaves), definition(*exact_leaves)
    of_value = _distance(value.detach(), exact.detach())
    if not gradients:
        return of_value, 0.0
    upstream = torch.randn_like(exact)
    ours = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    right = torch.autograd.grad(exact, exact_leaves, upstream)
    return of_value, max(_distance(one, other) for one, other in zip(ours, right, strict=True))


def _distance(ours: Tensor, right: Tensor) -> float:
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours.double() - right).abs().max() / right.abs().max())


def mlstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 100, H: int = 2, K: int = 16, V: int = 24
) -> list[Tensor]:
    """q, k, v, i and f as a model hands them over: views of one projection, gates in float32."""
    projected = torch.randn(B, T, H * (2 * K + V), device=device, dtype=dtype)
    heads = [each.unflatten(-1, (H, -1)) for each in projected.split((H * K, H * K, H * V), dim=-1)]
    gates = torch.randn(B, T, 2 * H, device=device).chunk(2, dim=-1)
    return [*heads, *(gate + shift for gate, shift in zip(gates, (-1.0, 3.0), strict=True))]


def slstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 70, H: int = 2, D: int = 24
) -> list[Tensor]:
    """wx, r and bias."""
    shapes = ((B, T, 4, H, D), (4, H, D, D), (4, H, D))
    scales = (1.0, D**-0.5, 1.0)
    return [scale * torch.randn(shape, device=device, dtype=dtype) for shape, scale in zip(shapes, scales, strict=True)]


def some_resets(inputs: list[Tensor]) -> Tensor:
    """(B, T) for such inputs: documents start at 0, in the middle of a chunk, at its border, and at the last token."""
    B, T = inputs[0].shape[:2]
    resets_BT = torch.zeros(B, T, dtype=torch.bool, device=inputs[0].device)
    resets_BT[:, [0, 31, min(64, T - 1), -1]] = True
    return resets_BT
