"""One entry for the selective scan, which picks the fastest form there is."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.selective_scan.operation import SCAN
from xlstm_lm.ops.selective_scan.recurrence import Result


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
        x_BTE: inputs (B, T, E).
        dt_BTE: step sizes, above 0; computed in float32 at least, as a_EN is.
        a_EN: decays, below 0.
        b_BTN, c_BTN: (B, T, N).
        resets: (B, T) bool, true where the state before the step is empty; None for no resets.
        initial_state: (B, E, N); None for an empty one.
        return_state: whether to return the last state, in float32 at least.
        backend: "auto" or the name of a backend of `SCAN`.

    Returns:
        y (B, T, E) in x's type, and the last state or None.

    Raises:
        ValueError: an unknown backend.
    """
    inputs = (x_BTE, dt_BTE, a_EN, b_BTN, c_BTN, initial_state)
    one_step = x_BTE.shape[1] == 1
    chosen = SCAN.backend_for(inputs, backend, has_resets=resets is not None, one_step=one_step, N=a_EN.shape[1])
    dtype = torch.promote_types(x_BTE.dtype, torch.float32)
    return chosen.loaded(
        x_BTE,
        dt_BTE.to(dtype),
        a_EN.to(dtype),
        b_BTN,
        c_BTN,
        resets_BT=resets,
        initial_state_BEN=initial_state,
        return_state=return_state,
    )
