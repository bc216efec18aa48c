"""The selective scan step by step: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import without_autocast

Result = tuple[Tensor, Tensor | None]


def scan_recurrence(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    a_EN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state_BEN: Tensor | None = None,
    return_state: bool = False,
) -> Result:
    """`selective_scan` (shapes and returns there) by autograd over the steps, in the type of dt."""
    dtype = dt_BTE.dtype
    state_BEN = initial_state_BEN
    if state_BEN is None:
        state_BEN = dt_BTE.new_zeros(x_BTE.shape[0], *a_EN.shape)
    kept = None if resets_BT is None else (~resets_BT).to(dtype).unbind(1)
    # unbind, because an index at each step would make the backward quadratic in T
    inputs = [each.to(dtype).unbind(1) for each in (dt_BTE, dt_BTE * x_BTE.to(dtype), b_BTN, c_BTN)]
    steps = []
    with without_autocast(x_BTE):
        for t, (dt_BE, input_BE, b_BN, c_BN) in enumerate(zip(*inputs, strict=True)):
            if kept is not None:
                state_BEN = state_BEN * kept[t][:, None, None]
            state_BEN = torch.exp(dt_BE[..., None] * a_EN) * state_BEN + input_BE[..., None] * b_BN[:, None]
            steps.append(torch.einsum("ben,bn->be", state_BEN, c_BN))
    return torch.stack(steps, dim=1).to(x_BTE.dtype), state_BEN if return_state else None
