"""Mamba-2's state space (SSD): a linear recurrence with one decay a head and step, which the mLSTM's kernels compute.

With its normalizer left away, the mLSTM is h_t = (sum_s e^(i_s) prod_(r > s) sigmoid(f_r) k_s v_s^T)^T q_t; so SSD is
an mLSTM with q = C, k = B, v = x, e^i = dt and sigmoid(f) = e^(dt A). Every speed-up of the one serves the other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import not_compiled
from xlstm_lm.ops.mlstm import mlstm
from xlstm_lm.ops.selfcheck import TOLERANCE, asked_once, proves_right, ssd_inputs, with_states

Result = tuple[Tensor, Tensor | None]


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Result:
    """S_t = e^(dt_t a) S_(t-1) + dt_t b_t x_t^T and y_t = S_t^T c_t for each head (arXiv 2405.21060, section 2).

    Args:
        x_BTHP: inputs (B, T, H, P). dt_BTH: step sizes, above 0. a_H: decays, below 0. b_BTGN, c_BTGN: (B, T, G, N)
            where G divides H: each group serves H / G heads. dt and a are taken in float32 at least.
        resets: (B, T) bool, true where the state before the step is empty. initial_state: (B, H, N, P) or None for an
            empty one. return_state: whether to return the last one, in float32 at least.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, P) in x's type, and the last state or None.

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        backend = choose_backend(x_BTHP)
    elif backend not in BACKENDS:
        raise ValueError(f"unknown SSD backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    return BACKENDS[backend](
        x_BTHP, dt_BTH.to(dtype), a_H.to(dtype), b_BTGN, c_BTGN, resets, initial_state, return_state
    )


def choose_backend(x_BTHP: Tensor) -> str:
    """What "auto" means: "mamba_ssm" on a GPU where that package is installed and proves right, else "mlstm"."""
    if x_BTHP.device.type == "cuda" and "mamba_ssm" in BACKENDS and x_BTHP.dtype in TOLERANCE:
        return "mamba_ssm" if _mamba_ssm_is_right(x_BTHP.device, x_BTHP.dtype) else "mlstm"
    return "mlstm"


def _recurrence(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, resets_BT, state_BHNP, return_state) -> Result:
    """Step by step: the definition."""
    b_BTHN, c_BTHN = (_for_each_head(each, x_BTHP.shape[2]).to(dt_BTH.dtype) for each in (b_BTGN, c_BTGN))
    if state_BHNP is None:
        state_BHNP = dt_BTH.new_zeros(x_BTHP.shape[0], x_BTHP.shape[2], b_BTGN.shape[3], x_BTHP.shape[3])
    decay_BTH = torch.exp(dt_BTH * a_H)
    steps = []
    for t in range(x_BTHP.shape[1]):
        if resets_BT is not None:
            state_BHNP = state_BHNP.masked_fill(resets_BT[:, t, None, None, None], 0)
        update_BHNP = b_BTHN[:, t, :, :, None] * (dt_BTH[:, t, :, None] * x_BTHP[:, t])[:, :, None]
        state_BHNP = decay_BTH[:, t, :, None, None] * state_BHNP + update_BHNP
        steps.append((state_BHNP * c_BTHN[:, t, :, :, None]).sum(2))
    return torch.stack(steps, dim=1).to(x_BTHP.dtype), state_BHNP if return_state else None


def _mlstm(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, resets_BT, state_BHNP, return_state, backend="auto") -> Result:
    heads, N = x_BTHP.shape[2], b_BTGN.shape[3]
    tiny = torch.finfo(dt_BTH.dtype).tiny
    decay_BTH = (-dt_BTH * a_H).clamp_min(tiny)
    initial_state = None
    if state_BHNP is not None:
        initial_state = (state_BHNP, torch.zeros_like(state_BHNP[..., 0]), torch.zeros_like(state_BHNP[..., 0, 0]))
    y_BTHP = mlstm(
        _for_each_head(c_BTGN * N**0.5, heads),  # the mLSTM divides its queries by it
        _for_each_head(b_BTGN, heads),
        x_BTHP,
        dt_BTH.clamp_min(tiny).log(),
        -decay_BTH - torch.log(-torch.expm1(-decay_BTH)),  # sigmoid of this is e^-decay, also for tiny and huge ones
        resets=resets_BT,
        initial_state=initial_state,
        return_state=return_state,
        normalize=False,
        backend=backend,
    )
    if not return_state:
        return y_BTHP, None
    y_BTHP, (state_BHNP, _, m_BH) = y_BTHP
    return y_BTHP, state_BHNP * m_BH.exp()[..., None, None]


@not_compiled("mamba_ssm")  # torch.compile cannot look into the package
def _mamba_ssm(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, resets_BT, state_BHNP, return_state) -> Result:
    mamba_chunk_scan_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    document_BT = None if resets_BT is None else resets_BT.cumsum(1).to(torch.int32)
    y_BTHP, state_BHPN = mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTGN,
        c_BTGN,
        chunk_size=256,
        seq_idx=document_BT,
        initial_states=None if state_BHNP is None else state_BHNP.transpose(2, 3).contiguous(),
        return_final_states=True,
    )
    return y_BTHP, state_BHPN.transpose(2, 3) if return_state else None


def _for_each_head(x_BTGN: Tensor, num_heads: int) -> Tensor:
    """(B, T, G, N) -> (B, T, H, N), without a copy where there is one group."""
    B, T, G, N = x_BTGN.shape
    return x_BTGN[:, :, :, None].expand(B, T, G, num_heads // G, N).reshape(B, T, num_heads, N)


BACKENDS: dict[str, Callable[..., Result]] = {
    "recurrence": _recurrence,
    "mlstm": _mlstm,
    "chunkwise": functools.partial(_mlstm, backend="chunkwise"),
}
"""The definition, the mLSTM's fastest kernels, and its form in plain PyTorch; where the package mamba_ssm is installed,
also its own for a GPU."""
if importlib.util.find_spec("mamba_ssm") is not None:
    BACKENDS["mamba_ssm"] = _mamba_ssm


@asked_once
def _mamba_ssm_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether mamba_ssm's kernels compute the definition on this device, values and gradients; if not, says so."""

    def prepare() -> tuple[Callable, Callable, list[Tensor]]:
        inputs = ssd_inputs(device, dtype)
        resets_BT = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=device)
        resets_BT[0, [31, 256, 299]] = True  # the other row goes from state to state
        run = functools.partial(with_states(ssd), resets=resets_BT)
        return *(functools.partial(run, backend=name) for name in ("mamba_ssm", "recurrence")), inputs

    return proves_right(prepare, device, dtype, kernel="mamba_ssm's kernels", instead="SSD takes the mLSTM's")
