"""The selective scan as a compiled CPU loop, given to autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    inputs = [each.to(dtype).contiguous() for each in (x_BTE, dt_BTE, a_EN, b_BTN, c_BTN)]
    resets_BT = None if resets_BT is None else resets_BT.contiguous()
    state_BEN = None if initial_state_BEN is None else initial_state_BEN.to(dtype).contiguous()
    y_BTE, state_BEN = _CompiledScan.apply(*inputs, resets_BT, state_BEN)
    return y_BTE.to(x_BTE.dtype), state_BEN if return_state else None


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTE, dt_BTE, a_EN, b_BTN, c_BTN, resets_BT, state_BEN):
        ctx.set_materialize_grads(False)
        inputs = (x_BTE, dt_BTE, a_EN, b_BTN, c_BTN, resets_BT)
        y_BTE, last_BEN, checkpoints = torch.ops.xlstm_lm.scan_forward(*inputs, state_BEN, any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, checkpoints)
        return y_BTE, last_BEN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTE, dlast_BEN):
        *inputs, checkpoints = ctx.saved_tensors
        dy_BTE = torch.zeros_like(inputs[0]) if dy_BTE is None else dy_BTE.contiguous()
        dlast_BEN = None if dlast_BEN is None else dlast_BEN.contiguous()
        dx, ddt, da, db, dc, dstate = torch.ops.xlstm_lm.scan_backward(*inputs, checkpoints, dy_BTE, dlast_BEN)
        return dx, ddt, da.sum(0), db.sum(0), dc.sum(0), None, dstate if ctx.needs_input_grad[6] else None
