"""The definition of the mLSTM: step after step, in plain differentiable PyTorch. Every other form is compared with it.

The state of a head is a matrix memory C (K x V), a normalizer n (K) and a stabilizer m. They stand for C e^m and n
e^m: m only keeps the numbers small, so it is detached wherever it appears and the gradients are those of the function
in true units. The value of m matters in one place, beside `eps`, and is a constant there too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """The mLSTM's options, the same tuple for every backend."""

    chunk_length: int | None = None
    """Steps a chunk; None for the backend's default. Only the chunkwise and compiled backends use it."""
    input_gate: str = "exp"
    """"exp" or "sigmoid"."""
    normalize: bool = True
    """False omits the denominator."""
    eps: float = 1e-6
    """Term added to the stabilized denominator."""


DEFAULTS = Options()


def gate_dtype(q: Tensor) -> torch.dtype:
    """The type in which gates and state are kept: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_state(q_BTHK: Tensor, v_BTHV: Tensor, input_gate: str) -> State:
    """The state before the first token: C = n = 0; m = -inf for the exp gate, 0 for the sigmoid gate."""
    B, _, H, K = q_BTHK.shape
    dtype, device = gate_dtype(q_BTHK), q_BTHK.device
    m = float("-inf") if input_gate == "exp" else 0.0
    return (
        torch.zeros(B, H, K, v_BTHV.shape[-1], dtype=dtype, device=device),
        torch.zeros(B, H, K, dtype=dtype, device=device),
        torch.full((B, H), m, dtype=dtype, device=device),
    )


def unit_stabilizer(state: State) -> State:
    """The same state with m = 0, as the sigmoid input gate keeps it."""
    C_BHKV, n_BHK, m_BH = state
    size_BH = m_BH.detach().exp()
    return C_BHKV * size_BH[..., None, None], n_BHK * size_BH[..., None], torch.zeros_like(m_BH)


def mlstm_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    options: Options = DEFAULTS,
) -> tuple[Tensor, State | None]:
    """The definition (arXiv 2405.04517, eq. 19-27; the sigmoid input gate as in arXiv 2503.14376), left to autograd.

    Shapes, options and returns as in `xlstm_lm.ops.mlstm.mlstm`, except that the state is always in the returned pair
    (None unless `return_state`).
    """
    _, input_gate, normalize, eps = options
    dtype = gate_dtype(q_BTHK)
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    q, k, v, log_input, forget = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH))
    q = q * K**-0.5
    log_forget = F.logsigmoid(forget)
    C, n, m = empty_state(q_BTHK, v_BTHV, input_gate) if initial_state is None else initial_state
    if input_gate == "sigmoid":
        log_input = F.logsigmoid(log_input)
        C, n, m = unit_stabilizer((C, n, m))
    C, n, m = C.to(dtype), n.to(dtype), m.detach().to(dtype)

    h = []
    for t in range(T):
        i_BH, lf_BH = log_input[:, t], log_forget[:, t]
        if resets_BT is not None:
            keep_B1 = ~resets_BT[:, t, None]
            C, n = C.where(keep_B1[..., None, None], 0.0), n.where(keep_B1[..., None], 0.0)
            m = m.where(keep_B1, float("-inf") if input_gate == "exp" else 0.0)
            lf_BH = lf_BH.where(keep_B1, 0.0)  # what is forgotten is empty already
        if input_gate == "exp":
            m_next = torch.maximum(lf_BH + m, i_BH).detach().clamp_min(torch.finfo(dtype).min)
        else:
            m_next = m
        F_BH, I_BH = (lf_BH + m - m_next).exp(), (i_BH - m_next).exp()
        k_BHK, v_BHV, q_BHK = I_BH[..., None] * k[:, t], v[:, t], q[:, t]
        C = F_BH[..., None, None] * C + k_BHK[..., :, None] * v_BHV[..., None, :]
        n = F_BH[..., None] * n + k_BHK
        m = m_next
        num_BHV = (q_BHK[..., None] * C).sum(-2)
        if normalize:
            d_BH = (q_BHK * n).sum(-1)
            num_BHV = num_BHV / (torch.maximum(d_BH.abs(), (-m).exp()) + eps)[..., None]
        else:
            num_BHV = num_BHV * m.exp()[..., None]
        h.append(num_BHV)
    return torch.stack(h, 1).to(v_BTHV.dtype), (C, n, m) if return_state else None
