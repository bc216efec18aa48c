"""The gated delta rule in matrix products over chunks of the sequence, as one operator with its exact backward.

Within a chunk of L steps, every write depends on the earlier ones through a unit lower triangular matrix, which one
triangular solve inverts for all chunks together (arXiv 2412.06464, section 3.3). Only the states between chunks follow
each other. A reset cuts the dependence: steps of different documents have no entry in these matrices.

The backward keeps the inputs alone and differentiates the chunks again, so memory between the passes does not grow
with the states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_lm.ops.compiling import custom_operator, without_autocast


class Chunks(NamedTuple):
    """Keys and gates of a sequence in N chunks of L steps. Steps beyond the end neither write nor decay."""

    k_BNHLK: Tensor
    """Keys."""
    beta_BNHL1: Tensor
    """Write strengths."""
    from_state_BNHL1: Tensor
    """Decay between the state before the chunk and each step; 0 if a reset is between them."""
    to_state_BNHL1: Tensor
    """Decay between each step and the state after the chunk; 0 if a reset is between them."""
    kept_BNH11: Tensor
    """Decay of the state over the chunk; 0 if the chunk has a reset."""
    decay_BNHLL: Tensor
    """Decay between each step (row) and an earlier one or itself (column); 0 in other columns and documents."""
    erased_BNHLL: Tensor
    """Share of an earlier write (column) that each step (row) erases; 0 in other columns."""


def cut(x_BTHX: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    """Chunks (B, N, H, L, X) of (B, T, H, X), with zeros beyond the end."""
    padded = F.pad(x_BTHX.to(dtype), (0, 0, 0, 0, 0, -x_BTHX.shape[1] % L))
    return padded.unflatten(1, (-1, L)).transpose(2, 3)


def cut_keys_and_gates(
    k_BTHK: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, resets_BT: Tensor | None, L: int, dtype: torch.dtype
) -> Chunks:
    """Chunks of L steps in `dtype`."""
    k, beta_BNHL1 = cut(k_BTHK, L, dtype), cut(beta_BTH[..., None], L, dtype)
    g_BNHL = cut(log_decay_BTH[..., None], L, dtype)[..., 0].cumsum(-1)
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=k.device).tril()
    if resets_BT is None:
        joined = causal_LL
        from_state, to_state = g_BNHL.exp(), (g_BNHL[..., -1:] - g_BNHL).exp()
        kept_BNH = g_BNHL[..., -1].exp()
    else:
        document_BN1L = F.pad(resets_BT, (0, -resets_BT.shape[1] % L)).unflatten(1, (-1, L)).cumsum(-1)[:, :, None]
        joined = causal_LL & (document_BN1L[..., :, None] == document_BN1L[..., None, :])
        last_BN11 = document_BN1L[..., -1:]
        from_state = g_BNHL.exp().masked_fill(document_BN1L > 0, 0)
        to_state = (g_BNHL[..., -1:] - g_BNHL).exp().masked_fill(document_BN1L < last_BN11, 0)
        kept_BNH = g_BNHL[..., -1].exp().masked_fill(last_BN11[..., 0] > 0, 0)
    # Masked before exp: a later step minus an earlier one of another document may overflow.
    decay_BNHLL = (g_BNHL[..., :, None] - g_BNHL[..., None, :]).masked_fill(~joined, -torch.inf).exp()
    erased_BNHLL = (beta_BNHL1 * decay_BNHLL * (k @ k.mT)).tril(-1)
    return Chunks(
        k, beta_BNHL1, from_state[..., None], to_state[..., None], kept_BNH[..., None, None], decay_BNHLL, erased_BNHLL
    )


def chunks_of(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor,
    chunk_length: int,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, V) and the last state (B, H, K, V) of `gated_delta`, in the type of the state, for autograd."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    L, dtype = min(chunk_length, T), C_BHKV.dtype
    chunks = cut_keys_and_gates(k_BTHK, log_decay_BTH, beta_BTH, resets_BT, L, dtype)
    q, k, v, beta = cut(q_BTHK, L, dtype) * K**-0.5, chunks.k_BNHLK, cut(v_BTHV, L, dtype), chunks.beta_BNHL1
    right = torch.cat((beta * v, beta * chunks.from_state_BNHL1 * k), dim=-1)
    solved = torch.linalg.solve_triangular(chunks.erased_BNHLL, right, upper=False, unitriangular=True)
    written_BNHLV, read_BNHLK = solved.split((v.shape[-1], K), dim=-1)
    keys_BNHLK = chunks.to_state_BNHL1 * k
    queries_BNHLK = chunks.from_state_BNHL1 * q
    scores_BNHLL = chunks.decay_BNHLL * (q @ k.mT)
    each_chunk = (written_BNHLV, read_BNHLK, keys_BNHLK, queries_BNHLK, scores_BNHLL, chunks.kept_BNH11)
    h_chunks = []
    # unbind, because the gradient of an index at each chunk would make the backward pass quadratic in T
    for written, read, keys, queries, scores, kept in zip(*(x.unbind(1) for x in each_chunk), strict=True):
        update_BHLV = written - read @ C_BHKV
        h_chunks.append(queries @ C_BHKV + scores @ update_BHLV)
        C_BHKV = kept * C_BHKV + keys.mT @ update_BHLV
    return torch.stack(h_chunks, dim=1).transpose(2, 3).flatten(1, 2)[:, :T], C_BHKV


def compute_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    C: Tensor,
    chunk_length: int,
) -> tuple[Tensor, Tensor]:
    """`chunks_of`, in new tensors and without autocast."""
    with without_autocast(q):
        h_BTHV, last_BHKV = chunks_of(q, k, v, log_decay, beta, resets, C, chunk_length)
    return h_BTHV.contiguous(), last_BHKV.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_length = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dh: Tensor, dC: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, resets, C = ctx.saved_tensors
    leaves = [x.detach().requires_grad_() for x in (*inputs, C)]
    q, k, v, log_decay, beta, first = leaves
    with torch.enable_grad(), without_autocast(C):
        values = chunks_of(q, k, v, log_decay, beta, resets, first, ctx.chunk_length)
        *gradients, dfirst = torch.autograd.grad(values, leaves, (dh, dC))
    return *gradients, None, dfirst, None


gated_delta_chunkwise = custom_operator(
    "gated_delta_chunkwise",
    compute_forward,
    lambda q, k, v, log_decay, beta, resets, C, chunk_length: (C.new_empty(v.shape), C.new_empty(C.shape)),
    gradients=_gradients,
    keep=_keep,
)
"""`compute_forward`, as one operator with its backward."""
