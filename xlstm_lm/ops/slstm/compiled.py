"""The sLSTM cell as a compiled CPU loop, given to autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from xlstm_lm.ops.native import load_kernels
from xlstm_lm.ops.slstm.recurrence import SLSTMState, compute_dtype


def slstm_compiled(
    wx_BTGHD: torch.Tensor,
    r_GHDE: torch.Tensor,
    bias_GHD: torch.Tensor,
    *,
    resets_BT: torch.Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    """The cell of `slstm_recurrence`, same arguments and results, for CPU tensors. Half precisions run in float32.

    Between the passes it keeps wx, y and a checkpoint of c, n and m every 32 steps. Differentiable once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    dtype = compute_dtype(wx_BTGHD.dtype)
    gates_BTGHD = wx_BTGHD.to(dtype)
    if gates_BTGHD.stride(-1) != 1:
        gates_BTGHD = gates_BTGHD.contiguous()
    r_GHDE, bias_GHD = r_GHDE.to(dtype).contiguous(), bias_GHD.to(dtype).contiguous()
    resets_BT = None if resets_BT is None else resets_BT.contiguous()
    state = () if initial_state is None else tuple(part.to(dtype).contiguous() for part in initial_state)

    differentiable = (gates_BTGHD, r_GHDE, bias_GHD, *state[:3])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        y_BTHD, c_BHD, n_BHD, m_BHD = _CompiledSLSTM.apply(gates_BTGHD, r_GHDE, bias_GHD, resets_BT, *state)
    else:
        y_BTHD, c_BHD, n_BHD, m_BHD, _ = torch.ops.xlstm_lm.slstm_forward(
            gates_BTGHD, r_GHDE, bias_GHD, resets_BT, state, False
        )
    final_state = (y_BTHD[:, -1], c_BHD, n_BHD, m_BHD)
    y_BTHD = y_BTHD.to(wx_BTGHD.dtype)
    return (y_BTHD, final_state) if return_state else y_BTHD


class _CompiledSLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wx_BTGHD, r_GHDE, bias_GHD, resets_BT, *state):
        ctx.set_materialize_grads(False)
        y_BTHD, c_BHD, n_BHD, m_BHD, checkpoints = torch.ops.xlstm_lm.slstm_forward(
            wx_BTGHD, r_GHDE, bias_GHD, resets_BT, state, True
        )
        y_initial_BHD = state[0] if state else None
        ctx.save_for_backward(wx_BTGHD, r_GHDE, bias_GHD, resets_BT, y_initial_BHD, y_BTHD, checkpoints)
        ctx.mark_non_differentiable(m_BHD)
        return y_BTHD, c_BHD, n_BHD, m_BHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHD, dc_BHD, dn_BHD, _):
        *inputs, y_BTHD, checkpoints = ctx.saved_tensors
        dy_BTHD = torch.zeros_like(y_BTHD) if dy_BTHD is None else dy_BTHD.contiguous()
        if dc_BHD is not None or dn_BHD is not None:
            zeros_BHD = torch.zeros_like(y_BTHD[:, 0])
            dc_BHD = zeros_BHD if dc_BHD is None else dc_BHD.contiguous()
            dn_BHD = zeros_BHD if dn_BHD is None else dn_BHD.contiguous()
        dwx, dr, dbias, *dstate = torch.ops.xlstm_lm.slstm_backward(
            *inputs, y_BTHD, checkpoints, dy_BTHD, dc_BHD, dn_BHD
        )
        with_state = len(ctx.needs_input_grad) > 4
        return dwx, dr.sum(0), dbias.sum(0), None, *((*dstate, None) if with_state else ())
