"""The comparison of a function with its definition: values and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest error of a kernel, relative to the largest entry of a value or gradient of its definition."""

Checked = Callable[..., Tensor | tuple[Tensor, ...]]
"""A function to check: of tensors, all of them leaves."""


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Compute with a fixed seed and with gradients, whatever the caller's random state, grad mode and saved-tensor
    hooks (activation checkpointing counts what is saved), and restore all of them."""
    itself = lambda saved: saved
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(itself, itself),
    ):
        torch.manual_seed(0)
        yield


def compare(function: Checked, definition: Checked, inputs: list[Tensor], gradients: bool = True) -> float:
    """Largest error of the values and, by default, of every gradient of `function` against `definition` in float64.

    Each is relative to the largest entry of what it should be; infinite where anything is not finite.
    """
    return max(errors(function, definition, inputs, gradients))


def errors(function: Checked, definition: Checked, inputs: list[Tensor], gradients: bool = True) -> tuple[float, float]:
    """The two parts of `compare`: largest error of the values, and of the gradients (0 without `gradients`)."""
    leaves = [each.detach().requires_grad_(gradients) for each in inputs]
    exact_leaves = [each.detach().double().requires_grad_(gradients) for each in inputs]
    values, exact = _several(function(*leaves)), _several(definition(*exact_leaves))
    of_values = _largest_distance(values, exact)
    if not gradients:
        return of_values, 0.0
    upstream = [torch.randn_like(each) for each in exact]
    ours = torch.autograd.grad(values, leaves, [each.to(x.dtype) for each, x in zip(upstream, values, strict=True)])
    right = torch.autograd.grad(exact, exact_leaves, upstream)
    return of_values, _largest_distance(ours, right)


def _several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else values


def _largest_distance(ours: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    return max(_distance(one.detach(), other.detach()) for one, other in zip(ours, right, strict=True))


def _distance(ours: Tensor, right: Tensor) -> float:
    if not (torch.isfinite(ours).all() and torch.isfinite(right).all()):
        return float("inf")
    error = (ours.double() - right).abs().max()
    return float(error / right.abs().max()) if error > 0 else 0.0


def some_resets(inputs: list[Tensor]) -> Tensor:
    """Resets (B, T) for such inputs.

    Documents of the first row start at 0, in the middle of a chunk, at its border, and at the last token. Those of the
    other rows start once: the initial state is seen before, and states cross every border after.
    """
    B, T = inputs[0].shape[:2]
    resets_BT = torch.zeros(B, T, dtype=torch.bool, device=inputs[0].device)
    resets_BT[0, [0, min(31, T - 1), min(64, T - 1), -1]] = True
    resets_BT[1:, min(5, T - 1)] = True
    return resets_BT
