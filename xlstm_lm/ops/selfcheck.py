"""Whether a function computes what its definition says, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a kernel may be from its definition, of the largest entry of a value or gradient."""


def compare(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], gradients: bool = True
) -> float:
    """Largest error of the value and, by default, of every gradient of `function` against `definition` in float64.

    Each is relative to the largest entry of what it should be; infinite where anything is not finite.
    """
    leaves = [each.detach().requires_grad_(gradients) for each in inputs]
    exact_leaves = [each.detach().double().requires_grad_(gradients) for each in inputs]
    value, exact = function(*leaves), definition(*exact_leaves)
    pairs = [(value.detach(), exact.detach())]
    if gradients:
        upstream = torch.randn_like(exact)
        ours = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
        pairs += zip(ours, torch.autograd.grad(exact, exact_leaves, upstream), strict=True)
    if not all(torch.isfinite(ours).all() for ours, _ in pairs):
        return float("inf")
    return max(float((ours.double() - right).abs().max() / right.abs().max()) for ours, right in pairs)
