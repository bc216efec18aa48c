"""One entry for the selective scan, which picks the fastest form there is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selective_scan.compiled import scan_compiled
from xlstm_lm.ops.selective_scan.recurrence import Result, scan_recurrence

BACKENDS: dict[str, Callable[..., Result]] = {"recurrence": scan_recurrence, "compiled": scan_compiled}
"""Every implementation by its name; all take the arguments of `selective_scan` but `backend`."""


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    a_EN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Result:
    """s_t = e^(dt_t a) s_(t-1) + dt_t b_t x_t and y_t = c_t . s_t, for each of E units with N states (arXiv 2312.00752,
    eq. 2 with the discretization of its reference implementation).

    Args:
        x_BTE: inputs (B, T, E). dt_BTE: step sizes, above 0. a_EN: decays, below 0. b_BTN, c_BTN: (B, T, N). dt and a
            are taken in float32 at least.
        resets: (B, T) bool, true where the state before the step is empty. initial_state: (B, E, N) or None for an
            empty one. return_state: whether to return the last one, in float32 at least.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, E) in x's type, and the last state or None.

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        backend = choose_backend(x_BTE)
    elif backend == "compiled" and x_BTE.device.type != "cpu":
        raise ValueError(f"the backend 'compiled' takes CPU tensors, but x is on {x_BTE.device}; choose 'auto'")
    elif backend not in BACKENDS:
        raise ValueError(
            f"unknown selective scan backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    dtype = torch.promote_types(x_BTE.dtype, torch.float32)
    return BACKENDS[backend](
        x_BTE,
        dt_BTE.to(dtype),
        a_EN.to(dtype),
        b_BTN,
        c_BTN,
        resets_BT=resets,
        initial_state_BEN=initial_state,
        return_state=return_state,
    )


def choose_backend(x_BTE: Tensor) -> str:
    """What "auto" means for an input like `x_BTE`. Builds the CPU kernel on first use."""
    slow = "Mamba-1's selective scan runs step by step in Python (`recurrence`), which is far slower"
    if x_BTE.device.type == "cpu":
        return "compiled" if kernels_available(slow) else "recurrence"
    announce_once(f"no fused selective scan for {x_BTE.device.type}: {slow}")
    return "recurrence"
