"""Effect of a slice of each row on the state of the gated delta rule, without outputs.

Every step is linear in the state, so a slice maps the state C before it to A C + sum_t z_t v_t^T. The matrix A (K, K)
and the vectors z_t (K) depend on keys and gates alone. Values appear only in the last sum, and queries nowhere, which
makes this pass cheaper than the cell.

The pass goes through the chunks from the last to the first. At each chunk it holds the matrix that maps the state after
the chunk to the state after the slice. Before the first chunk, this matrix is A. z_t is the matrix of step t's chunk
times the vector by which step t's value enters the state after that chunk.

The backward pass keeps the inputs alone and computes the chunks again, as the cell's does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import custom_operator, without_autocast
from xlstm_lm.ops.gated_delta.chunkwise import cut_keys_and_gates


def transition(
    k_BTHK: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, resets_BT: Tensor | None, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """z (B, T, H, K) and A (B, H, K, K), in float32 at least, for autograd."""
    T, K = k_BTHK.shape[1], k_BTHK.shape[-1]
    dtype = torch.promote_types(k_BTHK.dtype, torch.float32)
    chunks = cut_keys_and_gates(k_BTHK, log_decay_BTH, beta_BTH, resets_BT, min(chunk_length, T), dtype)
    k = chunks.k_BNHLK
    # The system of the cell, transposed: it removes from each write what later steps of its chunk erase.
    left_BNHLK = torch.linalg.solve_triangular(
        chunks.erased_BNHLL.mT, chunks.to_state_BNHL1 * k, upper=True, unitriangular=True
    )
    read_BNHLK = chunks.beta_BNHL1 * chunks.from_state_BNHL1 * k
    to_end_BHKK = torch.eye(K, dtype=dtype, device=k.device).expand(k.shape[0], k.shape[2], K, K)  # transposed
    z_chunks = []
    each_chunk = zip(*(x.unbind(1) for x in (left_BNHLK, read_BNHLK, chunks.kept_BNH11)), strict=True)
    for left, read, kept in reversed(list(each_chunk)):
        z_BHLK = left @ to_end_BHKK
        z_chunks.append(z_BHLK)
        to_end_BHKK = kept * to_end_BHKK - read.mT @ z_BHLK
    z_BNHLK = chunks.beta_BNHL1 * torch.stack(z_chunks[::-1], dim=1)
    return z_BNHLK.transpose(2, 3).flatten(1, 2)[:, :T], to_end_BHKK.mT


def compute_forward(
    k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, resets: Tensor | None, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """The sum over z_t v_t^T and the transition, in new tensors and without autocast."""
    with without_autocast(k):
        z_BTHK, A_BHKK = transition(k, log_decay, beta, resets, chunk_length)
        added_BHKV = torch.einsum("bthk,bthv->bhkv", z_BTHK, v.to(z_BTHK.dtype))
    return added_BHKV.contiguous(), A_BHKK.contiguous()


def _shapes(
    k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, resets: Tensor | None, chunk_length: int
) -> tuple[Tensor, Tensor]:
    (B, _, H, K), dtype = k.shape, torch.promote_types(k.dtype, torch.float32)
    return k.new_empty(B, H, K, v.shape[-1], dtype=dtype), k.new_empty(B, H, K, K, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_length = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dadded: Tensor, dA: Tensor) -> tuple[Tensor | None, ...]:
    k, v, log_decay, beta, resets = ctx.saved_tensors
    leaves = [x.detach().requires_grad_() for x in (k, log_decay, beta)]
    with torch.enable_grad(), without_autocast(k):
        z_BTHK, A_BHKK = transition(leaves[0], leaves[1], leaves[2], resets, ctx.chunk_length)
    with without_autocast(k):
        dz_BTHK = torch.einsum("bthv,bhkv->bthk", v.to(dadded.dtype), dadded)
        dv_BTHV = torch.einsum("bthk,bhkv->bthv", z_BTHK.detach(), dadded)
        dk, dlog_decay, dbeta = torch.autograd.grad((z_BTHK, A_BHKK), leaves, (dz_BTHK, dA))
    return dk, dv_BTHV.to(v.dtype), dlog_decay, dbeta, None, None


gated_delta_slice_effect = custom_operator(
    "gated_delta_slice_effect", compute_forward, _shapes, gradients=_gradients, keep=_keep
)
"""`compute_forward`, as one operator with its backward."""
