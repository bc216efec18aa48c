"""The selective scan as a compiled CPU loop."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import needs_gradient
from xlstm_lm.ops.native import load_kernels
from xlstm_lm.ops.selective_scan.recurrence import Result


def scan_compiled(
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
    """`selective_scan` (shapes and returns there) for CPU tensors, in the type of dt. Differentiable once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    dtype = dt_BTE.dtype
    resets_BT = None if resets_BT is None else resets_BT.contiguous()
    state_BEN = None if initial_state_BEN is None else initial_state_BEN.to(dtype).contiguous()
    inputs = (x_BTE, dt_BTE, a_EN.to(dtype).contiguous(), b_BTN, c_BTN)
    save = needs_gradient(*inputs, state_BEN)
    y_BTE, state_BEN, _ = torch.ops.xlstm_lm.scan_forward(*inputs, resets_BT, state_BEN, save)
    return y_BTE, state_BEN if return_state else None
