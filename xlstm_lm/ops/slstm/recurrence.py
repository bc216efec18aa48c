"""The sLSTM cell written as its definition: one step after another, differentiated by autograd.

Any dtype and any device. The other backends are held to this one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from xlstm_lm.ops.compiling import without_autocast

SLSTMState = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(y, c, n, m), each (B, H, D): output, cell, normalizer, and the stabilizer m; c and n are scaled by e^-m."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates and state for inputs of `dtype`: half precisions are carried in float32."""
    return torch.promote_types(dtype, torch.float32)


def empty_state(wx_BTGHD: torch.Tensor) -> SLSTMState:
    """The state before any input: y = c = n = 0 and m = -inf, each (B, H, D), in the dtype the cell computes in."""
    B, _, _, H, D = wx_BTGHD.shape
    zeros_BHD = wx_BTGHD.new_zeros(B, H, D, dtype=compute_dtype(wx_BTGHD.dtype))
    return zeros_BHD, zeros_BHD.clone(), zeros_BHD.clone(), torch.full_like(zeros_BHD, -torch.inf)


def slstm_recurrence(
    wx_BTGHD: torch.Tensor,
    r_GHDE: torch.Tensor,
    bias_GHD: torch.Tensor,
    *,
    resets_BT: torch.Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    """sLSTM with exponential input gate and sigmoid forget gate, step by step (arXiv 2405.04517, eqs. 8 to 17).

    Arguments, results and units are those of `xlstm_lm.ops.slstm.slstm`; nothing is validated here.
    The stabilizer m cancels between c and n and carries no gradient.
    """
    dtype = compute_dtype(wx_BTGHD.dtype)
    r_GHDE, bias_GHD = r_GHDE.to(dtype), bias_GHD.to(dtype)
    state = empty_state(wx_BTGHD) if initial_state is None else initial_state
    y_BHD, c_BHD, n_BHD, m_BHD = (part.to(dtype) for part in state)
    m_BHD = m_BHD.detach()
    reset_steps = [None] * wx_BTGHD.shape[1] if resets_BT is None else resets_BT[:, :, None, None].unbind(1)

    outputs = []
    with without_autocast(wx_BTGHD):
        for wx_BGHD, reset_B11 in zip(wx_BTGHD.unbind(1), reset_steps, strict=True):
            if reset_B11 is not None:
                y_BHD, c_BHD, n_BHD = (part.masked_fill(reset_B11, 0.0) for part in (y_BHD, c_BHD, n_BHD))
                m_BHD = m_BHD.masked_fill(reset_B11, -torch.inf)
            gates_BGHD = wx_BGHD.to(dtype) + torch.einsum("bhd,ghde->bghe", y_BHD, r_GHDE) + bias_GHD
            i_BHD, f_BHD, z_BHD, o_BHD = gates_BGHD.unbind(1)
            decayed_BHD = logsigmoid(f_BHD) + m_BHD
            m_BHD = torch.maximum(i_BHD, decayed_BHD).detach()
            input_BHD = torch.exp(i_BHD - m_BHD)
            forget_BHD = torch.exp(decayed_BHD - m_BHD)
            c_BHD = forget_BHD * c_BHD + input_BHD * torch.tanh(z_BHD)
            n_BHD = forget_BHD * n_BHD + input_BHD
            y_BHD = torch.sigmoid(o_BHD) * c_BHD / n_BHD
            outputs.append(y_BHD)

    y_BTHD = torch.stack(outputs, dim=1).to(wx_BTGHD.dtype)
    return (y_BTHD, (y_BHD, c_BHD, n_BHD, m_BHD)) if return_state else y_BTHD
