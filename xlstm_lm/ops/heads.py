"""Checks of the tensors of linear attention: queries, keys and values of several heads, and gates."""

from __future__ import annotations

import torch
from torch import Tensor


def sizes_of(q: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """B, T, H, K and V of queries (B, T, H, K) and values (B, T, H, V).

    Raises:
        ValueError: they have other dimensions, there is no step, or the queries are not floating point.
    """
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q and v must be (B, T, H, K) and (B, T, H, V), got {tuple(q.shape)} and {tuple(v.shape)}.")
    B, T, H, K = q.shape
    if T == 0:
        raise ValueError("The sequence is empty (T = 0): give at least one step.")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}.")
    return B, T, H, K, v.shape[-1]


def check_shapes(
    q: Tensor, v: Tensor, resets: Tensor | None, expected: dict[str, tuple[Tensor, tuple[int, ...]]]
) -> None:
    """Compare tensors, by name, with the shapes that go with q and v; resets are bool (B, T), or None.

    Raises:
        ValueError: one has another shape, or the resets another type.
    """
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must be bool, got {resets.dtype}.")
        expected = {**expected, "resets": (resets, (q.shape[0], q.shape[1]))}
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} to go with q {tuple(q.shape)} and v {tuple(v.shape)}, got {tuple(x.shape)}."
            )
