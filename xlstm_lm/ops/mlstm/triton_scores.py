"""Triton kernels for the L x L matrices between the steps of one chunk, all chunks at once.

In the forward these are the weights of values in outputs, with the division by the normalizer in them. In the
backward they are the gradients of queries' products with keys. Both are matrices (reader, source), in the type of the
inputs. They are a fraction of q in size, and computed once instead of by every block of the walks.

q . dq, part of the gates' gradients, follows from h . dh, because num and d are linear in q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.gpu import padded
from xlstm_lm.ops.mlstm.triton_gates import Gates
from xlstm_lm.ops.mlstm.triton_launch import Plan
from xlstm_lm.ops.mlstm.triton_tiles import chunk_weights, load_tile, weights_between

WIDEST = 64
"""Entries of q, k, h, dh and v that a program takes at a time."""


@triton.jit
def _normalizer(d, m, eps):
    """The divisor of num: max(|d|, 1 in units of e^m), and eps in units of 1."""
    return tl.maximum(tl.abs(d), tl.exp2(-m)) + eps


@triton.jit
def _store_scores(scores_ptr, scores, pair, first, T, L: tl.constexpr):
    step = tl.arange(0, L)
    scores_ptr += (pair * tl.cdiv(T, L) * L + first) * L
    tl.store(scores_ptr + step[:, None] * L + step[None, :], scores.to(scores_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "eps", "scale"])
def scores_kernel(
    q_ptr,
    k_ptr,
    n_ptr,
    c_ptr,
    x_ptr,
    m_ptr,
    segment_ptr,
    scores_ptr,
    x_divided_ptr,
    d_ptr,
    q_strides,
    k_strides,
    T,
    H,
    eps,
    scale,
    K: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk's weights of values in outputs, its normalizers d, and x_divided: x with the division of num by the
    normalizer, and the scale of q, put into the exponent."""
    chunks = tl.cdiv(T, L)
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // chunks, (program % chunks).to(tl.int32)
    row, head = pair // H, pair % H
    q_ptr += row * q_strides[0] + head * q_strides[2]
    k_ptr += row * k_strides[0] + head * k_strides[2]
    n_ptr += (pair * (chunks + 1) + chunk) * K
    c_ptr += pair * T
    x_ptr += pair * T
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)
    first = chunk * L
    t = first + tl.arange(0, L)
    inside = t < T
    scores = tl.zeros([L, L], tl.float32)
    q_n = tl.zeros([L], tl.float32)
    for start in range(0, K, BLOCK_K):
        q = load_tile(q_ptr, q_strides, first, start, T, K, L, BLOCK_K)
        k = load_tile(k_ptr, k_strides, first, start, T, K, L, BLOCK_K)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        if NORMALIZE:
            key = start + tl.arange(0, BLOCK_K)
            q_n += tl.sum(q * tl.load(n_ptr + key, key < K, 0.0)[None, :], 1)
    scores *= weights_between(c_ptr, x_ptr, segment_ptr, first, T, L, HAS_RESETS)
    m = tl.load(m_ptr + t + 1, inside, 0.0)
    if NORMALIZE:
        query, _, _ = chunk_weights(c_ptr, x_ptr, x_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS)
        d = (tl.sum(scores, 1) + q_n * query) * scale
        factor = scale / _normalizer(d, m, eps)
        tl.store(d_ptr + pair * T + t, d, inside)
    else:
        factor = scale * tl.exp2(m)
    x = tl.load(x_ptr + t, inside, 0.0)
    tl.store(x_divided_ptr + pair * T + t, x - tl.log2(factor), inside)
    _store_scores(scores_ptr, scores * factor[:, None], pair, first, T, L)


@triton.jit(do_not_specialize=["T", "H", "eps"])
def dscores_kernel(
    h_ptr,
    dh_ptr,
    v_ptr,
    c_ptr,
    x_divided_ptr,
    m_ptr,
    d_ptr,
    segment_ptr,
    dscores_ptr,
    delta_ptr,
    q_dq_ptr,
    h_strides,
    dh_strides,
    v_strides,
    T,
    H,
    eps,
    V: tl.constexpr,
    L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk's gradients of queries' products with keys, of d (delta, times what num is divided by), and q . dq."""
    chunks = tl.cdiv(T, L)
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // chunks, (program % chunks).to(tl.int32)
    row, head = pair // H, pair % H
    h_ptr += row * h_strides[0] + head * h_strides[2]
    dh_ptr += row * dh_strides[0] + head * dh_strides[2]
    v_ptr += row * v_strides[0] + head * v_strides[2]
    segment_ptr += row * (T + 1)
    first = chunk * L
    t = first + tl.arange(0, L)
    inside = t < T
    dscores = tl.zeros([L, L], tl.float32)
    h_dh = tl.zeros([L], tl.float32)
    for start in range(0, V, BLOCK_V):
        h = load_tile(h_ptr, h_strides, first, start, T, V, L, BLOCK_V)
        dh = load_tile(dh_ptr, dh_strides, first, start, T, V, L, BLOCK_V)
        v = load_tile(v_ptr, v_strides, first, start, T, V, L, BLOCK_V)
        dscores = tl.dot(dh, tl.trans(v), dscores, input_precision=PRECISION)
        h_dh += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
    if NORMALIZE:
        m = tl.load(m_ptr + pair * (T + 1) + t + 1, inside, 0.0)
        d = tl.load(d_ptr + pair * T + t, inside, 0.0)
        active = tl.abs(d) > tl.exp2(-m)
        delta = tl.where(active, tl.where(d > 0, -h_dh, h_dh), 0.0)
        q_dq = tl.where(active, h_dh * (eps / _normalizer(d, m, eps)), h_dh)
        dscores += delta[:, None]
    else:
        delta = tl.zeros([L], tl.float32)
        q_dq = h_dh
    tl.store(delta_ptr + pair * T + t, delta, inside)
    tl.store(q_dq_ptr + pair * T + t, q_dq, inside)
    dscores *= weights_between(c_ptr + pair * T, x_divided_ptr + pair * T, segment_ptr, first, T, L, HAS_RESETS)
    _store_scores(dscores_ptr, dscores, pair, first, T, L)


def scores(
    q_BTHK: Tensor, k_BTHK: Tensor, n_BHNK: Tensor, gates: Gates, plan: Plan, *, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of values in outputs (B, H, chunks, L, L), x_divided and d (B, H, T): see `scores_kernel`.

    `n_BHNK` is n at every border of chunks; d has no content unless `normalize`.
    """
    B, T, H, K = q_BTHK.shape
    chunks = triton.cdiv(T, plan.L)
    scores_BHNLL = q_BTHK.new_empty(B, H, chunks, plan.L, plan.L)
    x_divided_BHT, d_BHT = torch.empty_like(gates.x_BHT), torch.empty_like(gates.x_BHT)
    scores_kernel[(B * H * chunks,)](
        q_BTHK,
        k_BTHK,
        n_BHNK,
        gates.c_BHT,
        gates.x_BHT,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        scores_BHNLL,
        x_divided_BHT,
        d_BHT,
        q_BTHK.stride(),
        k_BTHK.stride(),
        T,
        H,
        eps,
        K**-0.5,
        K=K,
        L=plan.L,
        BLOCK_K=min(padded(K), WIDEST),
        NORMALIZE=normalize,
        HAS_RESETS=gates.segment_BT1 is not None,
        PRECISION=plan.precision,
        num_warps=4,
        num_stages=2,
    )
    return scores_BHNLL, x_divided_BHT, d_BHT


def dscores(
    h_BTHV: Tensor,
    dh_BTHV: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    x_divided_BHT: Tensor,
    d_BHT: Tensor,
    plan: Plan,
    *,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries' products with keys (B, H, chunks, L, L), delta and q . dq (B, H, T): see
    `dscores_kernel`."""
    B, T, H, V = h_BTHV.shape
    chunks = triton.cdiv(T, plan.L)
    dscores_BHNLL = v_BTHV.new_empty(B, H, chunks, plan.L, plan.L)
    delta_BHT, q_dq_BHT = torch.empty_like(d_BHT), torch.empty_like(d_BHT)
    dscores_kernel[(B * H * chunks,)](
        h_BTHV,
        dh_BTHV,
        v_BTHV,
        gates.c_BHT,
        x_divided_BHT,
        gates.m_BHT1,
        d_BHT,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        dscores_BHNLL,
        delta_BHT,
        q_dq_BHT,
        h_BTHV.stride(),
        dh_BTHV.stride(),
        v_BTHV.stride(),
        T,
        H,
        eps,
        V=V,
        L=plan.L,
        BLOCK_V=min(padded(V), WIDEST),
        NORMALIZE=normalize,
        HAS_RESETS=gates.segment_BT1 is not None,
        PRECISION=plan.precision,
        num_warps=4,
        num_stages=2,
    )
    return dscores_BHNLL, delta_BHT, q_dq_BHT
