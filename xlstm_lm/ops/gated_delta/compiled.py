"""The gated delta rule as a compiled CPU loop."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import needs_gradient
from xlstm_lm.ops.native import load_kernels


def gated_delta_compiled(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor,
    chunk_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, V) and the last state (B, H, K, V) of `gated_delta` for CPU tensors, in the type of the state.
    Computed step by step, without chunks. Differentiable once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    del chunk_length
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    save = needs_gradient(*inputs, C_BHKV)
    h_BTHV, C_BHKV, _ = torch.ops.xlstm_lm.gated_delta_forward(*inputs, resets_BT, C_BHKV, save)
    return h_BTHV, C_BHKV
