"""One token of the mLSTM for generation: state in, state out or the same one overwritten, in few passes over it. No
gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_lm.ops.mlstm.recurrence import DEFAULTS, Options, State, empty_state, gate_dtype


@torch.no_grad()
def mlstm_step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    i_B1H: Tensor,
    f_B1H: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = True,
    options: Options = DEFAULTS,
    overwrite_state: bool = False,
) -> tuple[Tensor, State | None]:
    """One step of the definition (arXiv 2405.04517, eq. 19-27) for inputs with T = 1.

    Shapes, options and returns as in `xlstm_lm.ops.mlstm.mlstm`. With `overwrite_state` the returned C is the initial
    state's tensor (where that is contiguous, of the state's type and no resets are given), otherwise a new one; n and m
    are always new.

    Raises:
        ValueError: more than one token.
    """
    _, input_gate, normalize, eps = options
    if q_B1HK.shape[1] != 1:
        raise ValueError(f"The step backend takes one token, T = 1, got T = {q_B1HK.shape[1]}: use 'chunkwise'.")
    dtype = gate_dtype(q_B1HK)
    B, _, H, K = q_B1HK.shape
    V = v_B1HV.shape[-1]
    q_GK, k_GK, v_GV = (x.to(dtype).reshape(B * H, -1) for x in (q_B1HK, k_B1HK, v_B1HV))
    log_input_G, log_forget_G = i_B1H.to(dtype).reshape(B * H), F.logsigmoid(f_B1H.to(dtype)).reshape(B * H)
    state = empty_state(q_B1HK, v_B1HV, input_gate) if initial_state is None else initial_state
    C_GKV, n_GK, m_G = (x.to(dtype).contiguous().flatten(0, 1) for x in state)
    if resets_BT is not None:
        restarts_G1 = resets_BT.expand(B, H).reshape(B * H, 1)
        C_GKV, n_GK = C_GKV.masked_fill(restarts_G1[..., None], 0.0), n_GK.masked_fill(restarts_G1, 0.0)
        m_G = m_G.masked_fill(restarts_G1[:, 0], float("-inf"))

    forget_exponent_G = log_forget_G + m_G
    if input_gate == "exp":
        m_G = torch.maximum(forget_exponent_G, log_input_G).clamp_min(torch.finfo(dtype).min)
    else:
        log_input_G, m_G = F.logsigmoid(log_input_G), torch.zeros_like(m_G)
    F_G1 = (forget_exponent_G - m_G).exp()[:, None]
    k_GK = k_GK * (log_input_G - m_G).exp()[:, None]
    C_GKV = torch.mul(C_GKV, F_G1[..., None], out=C_GKV if overwrite_state else None)
    C_GKV.baddbmm_(k_GK[:, :, None], v_GV[:, None])
    n_GK = n_GK * F_G1 + k_GK

    h_GV = torch.bmm(q_GK[:, None], C_GKV)[:, 0] * K**-0.5
    if normalize:
        d_G = (q_GK * n_GK).sum(-1).abs() * K**-0.5
        h_GV /= (torch.maximum(d_G, (-m_G).exp()) + eps)[:, None]
    else:
        h_GV *= m_G.exp()[:, None]
    h_B1HV = h_GV.view(B, 1, H, V).to(v_B1HV.dtype)
    return h_B1HV, (C_GKV.view(B, H, K, V), n_GK.view(B, H, K), m_G.view(B, H)) if return_state else None
