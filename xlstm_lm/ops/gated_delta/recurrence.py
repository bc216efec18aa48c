"""The gated delta rule step by step: the reference that the other forms are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor,
    chunk_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, V) and the last state (B, H, K, V) of `gated_delta`, in the type of the state."""
    del chunk_length
    dtype = C_BHKV.dtype
    q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH = (
        x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    )
    decay_BTH = log_decay_BTH.exp()
    scale = q_BTHK.shape[-1] ** -0.5
    steps = []
    for t in range(q_BTHK.shape[1]):
        if resets_BT is not None:
            C_BHKV = C_BHKV.masked_fill(resets_BT[:, t, None, None, None], 0)
        k_BHK1 = k_BTHK[:, t, :, :, None]
        C_BHKV = decay_BTH[:, t, :, None, None] * C_BHKV
        read_BHV = (k_BHK1 * C_BHKV).sum(2)
        write_BHV = beta_BTH[:, t, :, None] * (v_BTHV[:, t] - read_BHV)
        C_BHKV = C_BHKV + k_BHK1 * write_BHV[:, :, None]
        steps.append(scale * (q_BTHK[:, t, :, :, None] * C_BHKV).sum(2))
    return torch.stack(steps, dim=1), C_BHKV
