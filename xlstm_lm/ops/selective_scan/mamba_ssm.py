"""The selective scan by the CUDA kernel of the package mamba_ssm, which supports neither documents nor initial states.

Additional steps put both into the one scan that it computes. In front of each document there is a step long enough to
forget everything; before the row, one tiny step for each state unit, which writes that unit of the initial state; after
the row, one step of no length for each, which reads that unit of the last state. Gradients follow the same ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import not_compiled
from xlstm_lm.ops.selective_scan.recurrence import Result

FORGETS = 1e20  # e^(FORGETS a) is 0 for every decay that is not
WRITES = 2.0**-40  # e^(WRITES a) is 1, and the state times and over it is itself


@not_compiled("mamba_ssm")  # torch.compile cannot look into the package
def scan_mamba_ssm(
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
    """`selective_scan` (shapes and returns there) on a GPU, all in the type of dt. Differentiable once.

    Raises:
        ImportError: mamba_ssm is not installed.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    B, T, N = b_BTN.shape
    steps = [(dt_BTE, *(each.to(dt_BTE.dtype) for each in (x_BTE, b_BTN, c_BTN)))]
    if resets_BT is not None:
        place_BT = torch.arange(T, device=x_BTE.device) + resets_BT.cumsum(1)  # with a step in front of each document
        length = int(place_BT[:, -1].max()) + 1
        place = (place_BT + length * torch.arange(B, device=x_BTE.device)[:, None]).flatten()
        dt_BLE, *others = (_at(place, each, length) for each in steps[0])
        forgetting_BT = FORGETS * resets_BT.to(dt_BTE.dtype)
        forgetting_BL = dt_BTE.new_zeros(B, length).scatter(1, (place_BT - 1).clamp_min(0), forgetting_BT)
        steps = [(dt_BLE + forgetting_BL[..., None], *others)]
    length = steps[0][0].shape[1]
    none_BNE, none_BNN = dt_BTE.new_zeros(B, N, x_BTE.shape[2]), dt_BTE.new_zeros(B, N, N)
    unit_BNN = torch.eye(N, dtype=dt_BTE.dtype, device=x_BTE.device).expand(B, N, N)
    first = 0
    if initial_state_BEN is not None:
        state_BNE = initial_state_BEN.to(dt_BTE.dtype).transpose(1, 2)
        steps.insert(0, (none_BNE + WRITES, state_BNE / WRITES, unit_BNN, none_BNN))
        first = N
    if return_state:
        steps.append((none_BNE, none_BNE, none_BNN, unit_BNN))
    dt, x, b, c = (torch.cat(each, dim=1).transpose(1, 2) for each in zip(*steps, strict=True))
    y = selective_scan_fn(x, dt, a_EN, b, c).transpose(1, 2)
    y_BTE = y[:, first : first + length]
    if resets_BT is not None:
        y_BTE = y_BTE.flatten(0, 1).index_select(0, place).unflatten(0, (B, T))
    return y_BTE.to(x_BTE.dtype), y[:, first + length :].transpose(1, 2) if return_state else None


def _at(place: Tensor, each_BTF: Tensor, length: int) -> Tensor:
    """(B, length, F): the steps at their places in the longer rows laid end to end, zeros between."""
    B, _, F = each_BTF.shape
    return each_BTF.new_zeros(B * length, F).index_copy(0, place, each_BTF.flatten(0, 1)).unflatten(0, (B, length))
