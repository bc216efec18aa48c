"""Effects of slices of a row on a recurrent state, for rows that several processes share.

Each cell here is linear in its state: a slice maps the state S before it to A S + B, and the columns of S do not mix.
The effect of a slice holds A and B; the state before any slice follows from the effects of those before it. Resets need
no special case: a slice with one has A = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.gated_delta import CHUNK_LENGTH, GATED_DELTA, gated_delta
from xlstm_lm.ops.gated_delta.slice_effect import gated_delta_slice_effect
from xlstm_lm.ops.selective_scan import selective_scan

State = tuple[Tensor, ...]
"""Columns (..., V) of a state, then tensors that all columns share."""


class Effect(NamedTuple):
    """Effect of a slice of each row on the state."""

    columns: Tensor
    """Numbers (..., V) that differ between the columns of the state: B, and the decays if each column has its own."""
    shared: tuple[Tensor, ...] = ()
    """Numbers that all columns share, such as A."""


class StateRules(NamedTuple):
    """Rules to compute a state from the effects of the slices before it."""

    start: Callable[[Tensor], State]
    """The empty state, from zeros in the shape of an effect's columns. Gradients of the state flow back to them."""
    after_slice: Callable[[State, Effect], State]
    """The state after a slice, from the state before it and the slice's effect."""


def mlstm_effect(
    k_BTHK: Tensor, v_BTHV: Tensor, log_input_BTH: Tensor, log_forget_BTH: Tensor, resets_BT: Tensor | None
) -> Effect:
    """Effect on C and n of the mLSTM, or on C alone with the same algebra in SSD.

    Args:
        k_BTHK: keys (B, T, H, K).
        v_BTHV: values (B, T, H, V).
        log_input_BTH: logarithm of the input gate after its activation (B, T, H).
        log_forget_BTH: logarithm of the forget gate after its activation (B, T, H).
        resets_BT: (B, T) bool, true where the state before the step is empty; None for no resets.

    Returns:
        Columns (B, H, K, V + 1) in units of e^m, of which the last is n. Shared: m (B, H), and the sum (B, H) of the
        logarithms of the forget gates, which is -inf if the slice has a reset.
    """
    dtype = log_input_BTH.dtype
    # Sums from the end are small where the weight is large, which keeps float32 exact enough over any length.
    to_end_BTH = log_forget_BTH.flip(1).cumsum(1).flip(1)
    log_decay_BH = to_end_BTH[:, 0]
    log_weight_BTH = log_input_BTH + to_end_BTH - log_forget_BTH
    if resets_BT is not None:
        later_reset_BT = resets_BT.flip(1).cumsum(1).flip(1) - resets_BT.long() > 0
        log_weight_BTH = log_weight_BTH.masked_fill(later_reset_BT[..., None], -torch.inf)
        log_decay_BH = log_decay_BH.masked_fill(resets_BT.any(1, keepdim=True), -torch.inf)
    m_BH = log_weight_BTH.detach().amax(1).clamp_min(torch.finfo(dtype).min)
    weighted_BTHK = (log_weight_BTH - m_BH[:, None]).exp()[..., None] * k_BTHK.to(dtype)
    C_BHKV = torch.einsum("bthk,bthv->bhkv", weighted_BTHK, v_BTHV.to(dtype))
    return Effect(torch.cat((C_BHKV, weighted_BTHK.sum(1)[..., None]), dim=-1), (m_BH, log_decay_BH))


def _mlstm_start(zeros: Tensor) -> State:
    return zeros, zeros.detach()[..., 0, 0] - torch.inf


def _mlstm_after_slice(state: State, effect: Effect) -> State:
    (C_BHKV, m_BH), (added_BHKV, (m_added_BH, log_decay_BH)) = state, effect
    kept_BH = m_BH + log_decay_BH
    m_next_BH = torch.maximum(kept_BH, m_added_BH).detach()
    keep, add = ((log_BH - m_next_BH).exp()[..., None, None] for log_BH in (kept_BH, m_added_BH))
    return keep * C_BHKV + add * added_BHKV, m_next_BH


MLSTM_RULES = StateRules(_mlstm_start, _mlstm_after_slice)
"""The state is C and n side by side (B, H, K, V + 1) in units of e^m, and m (B, H), which has no gradient."""


def scan_effect(
    x_BTE: Tensor, dt_BTE: Tensor, a_EN: Tensor, b_BTN: Tensor, resets_BT: Tensor | None, backend: str = "auto"
) -> Effect:
    """Effect on the state of the selective scan, whose arguments these are.

    The scan itself computes it, with c = 0. The sum over all steps in PyTorch operations, without a scan, is no faster
    than the recurrence and far slower than the compiled scan: each needs an exponential for every state and step.

    Returns:
        Columns (B, 2 N, E): the state (E, N) after the slice, transposed, and below it the logarithms of its decay.
    """
    _, state_BEN = selective_scan(
        x_BTE, dt_BTE, a_EN, b_BTN, torch.zeros_like(b_BTN), resets=resets_BT, return_state=True, backend=backend
    )
    assert state_BEN is not None
    log_decay_BEN = dt_BTE.sum(1)[..., None] * a_EN
    if resets_BT is not None:
        log_decay_BEN = log_decay_BEN.masked_fill(resets_BT.any(1)[:, None, None], -torch.inf)
    return Effect(torch.cat((state_BEN, log_decay_BEN), dim=-1).mT)


def _scan_start(zeros: Tensor) -> State:
    return (zeros[:, : zeros.shape[1] // 2],)


def _scan_after_slice(state: State, effect: Effect) -> State:
    added_BNE, log_decay_BNE = effect.columns.chunk(2, dim=1)
    return (log_decay_BNE.exp() * state[0] + added_BNE,)


SCAN_RULES = StateRules(_scan_start, _scan_after_slice)
"""The state is transposed: (B, N, E)."""


def delta_effect(
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    resets_BT: Tensor | None,
    chunk_length: int | None = None,
    backend: str = "auto",
) -> Effect:
    """Effect on the state of the gated delta rule, whose arguments these are.

    The chunkwise backend has a pass without outputs. The others run the cell on values of V + K columns, of which K
    are zero and begin with the identity: one call gives both B and A. fla offers no kernel for the state alone.

    Returns:
        Columns (B, H, K, V): B. Shared (B, H, K, K): A.
    """
    B, _, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    inputs = (k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    has_resets, one_step = resets_BT is not None, k_BTHK.shape[1] == 1
    chosen = GATED_DELTA.backend_for(inputs, backend, has_resets=has_resets, one_step=one_step, K=K, V=V + K)
    if chosen.name == "chunkwise":
        added_BHKV, kept_BHKK = gated_delta_slice_effect(*inputs, resets_BT, chunk_length or CHUNK_LENGTH)
        return Effect(added_BHKV, (kept_BHKK,))
    state_BHKV = torch.eye(K, dtype=beta_BTH.dtype, device=k_BTHK.device).expand(B, H, K, K)
    _, state_BHKV = gated_delta(
        torch.zeros_like(k_BTHK),
        k_BTHK,
        F.pad(v_BTHV, (0, K)),
        log_decay_BTH,
        beta_BTH,
        resets=resets_BT,
        initial_state=F.pad(state_BHKV, (V, 0)),
        return_state=True,
        chunk_length=chunk_length,
        backend=backend,
    )
    added_BHKV, kept_BHKK = state_BHKV.split((V, K), dim=-1)
    return Effect(added_BHKV, (kept_BHKK,))


DELTA_RULES = StateRules(lambda zeros: (zeros,), lambda state, effect: (effect.shared[0] @ state[0] + effect.columns,))
"""The state is C (B, H, K, V)."""
