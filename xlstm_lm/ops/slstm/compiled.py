"""The sLSTM cell as a compiled CPU loop."""

from __future__ import annotations

import torch

from xlstm_lm.ops.compiling import needs_gradient
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

    Between the passes wx, y and a checkpoint of c, n and m every 32 steps are kept. Differentiable once.

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
    state = (None,) * 4 if initial_state is None else tuple(part.to(dtype).contiguous() for part in initial_state)
    y_BHD, c_BHD, n_BHD, m_BHD = state
    save = needs_gradient(gates_BTGHD, r_GHDE, bias_GHD, y_BHD, c_BHD, n_BHD)
    m_BHD = None if m_BHD is None else m_BHD.detach()
    y_BTHD, c_BHD, n_BHD, m_BHD, _ = torch.ops.xlstm_lm.slstm_forward(
        gates_BTGHD, r_GHDE, bias_GHD, resets_BT, y_BHD, c_BHD, n_BHD, m_BHD, save
    )
    final_state = (y_BTHD[:, -1], c_BHD, n_BHD, m_BHD)
    y_BTHD = y_BTHD.to(wx_BTGHD.dtype)
    return (y_BTHD, final_state) if return_state else y_BTHD
