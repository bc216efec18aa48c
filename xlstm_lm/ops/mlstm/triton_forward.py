"""Triton kernel for the mLSTM's output: a walk through each super-chunk with the state in registers.

A program has one super-chunk of one head and a block of the value dimension. It starts from the state at the border and
takes chunk after chunk: the output from the steps of the chunk and from the state before it, then the state after it.
So the state never goes through device memory within a super-chunk.
"""

# ruff: noqa: RUF005 (Triton knows no starred expressions)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_gates import (
    Gates,
    chunk_weights,
    load_tile,
    normalizer,
    store_tile,
    weights_between,
)
from xlstm_lm.ops.mlstm.triton_launch import Launch, Plan
from xlstm_lm.ops.mlstm.triton_states import Borders


@triton.jit(do_not_specialize=["T", "chunks", "has_state", "eps", "scale"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    c_ptr,
    x_ptr,
    m_ptr,
    segment_ptr,
    C_ptr,
    n_ptr,
    h_ptr,
    d_ptr,
    q_strides,
    k_strides,
    v_strides,
    h_strides,
    T,
    H,
    chunks,
    has_state,
    eps,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of h in one super-chunk of `chunks` chunks, and d, the normalizer (the same in every block).

    The scale of q is left out of its products and put into the normalizer and what num is divided by.
    """
    blocks = tl.cdiv(V, BLOCK_V)
    supers = tl.cdiv(tl.cdiv(T, L), chunks)
    program = tl.program_id(0).to(tl.int64)
    block, rest = (program % blocks).to(tl.int32), program // blocks
    super_chunk, pair = (rest % supers).to(tl.int32), rest // supers
    row, head = pair // H, pair % H
    value = block * BLOCK_V + tl.arange(0, BLOCK_V)
    q_ptr += row * q_strides[0] + head * q_strides[2]
    k_ptr += row * k_strides[0] + head * k_strides[2]
    v_ptr += row * v_strides[0] + head * v_strides[2]
    h_ptr += row * h_strides[0] + head * h_strides[2]
    c_ptr += pair * T
    x_ptr += pair * T
    d_ptr += pair * T
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)

    border = pair * (supers + 1) + super_chunk
    there = (super_chunk > 0) | (has_state != 0)
    C, n = (), ()
    for part in tl.static_range(PARTS):
        key = part * BLOCK_K + tl.arange(0, BLOCK_K)
        C_part = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        n_part = tl.zeros([BLOCK_K], tl.float32)
        if there:
            C_part = tl.load(
                C_ptr + border * K * V + key[:, None] * V + value[None, :],
                (key < K)[:, None] & (value < V)[None, :],
                0.0,
            )
            n_part = tl.load(n_ptr + border * K + key, key < K, 0.0)
        C, n = C + (C_part,), n + (n_part,)
    begin = super_chunk * chunks
    for chunk in range(begin, tl.minimum(begin + chunks, tl.cdiv(T, L))):
        first = chunk * L
        t = tl.arange(0, L)
        inside = first + t < T
        v = load_tile(v_ptr, v_strides, first, block * BLOCK_V, T, V, L, BLOCK_V)
        c, x, segment, as_query, as_key, kept = chunk_weights(
            c_ptr, x_ptr, x_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS
        )
        weighted_v = (v * as_key[:, None]).to(v.dtype)
        scores = tl.zeros([L, L], tl.float32)
        num = tl.zeros([L, BLOCK_V], tl.float32)
        d = tl.zeros([L], tl.float32)
        C_next, n_next = (), ()
        for part in tl.static_range(PARTS):
            q = load_tile(q_ptr, q_strides, first, part * BLOCK_K, T, K, L, BLOCK_K)
            k = load_tile(k_ptr, k_strides, first, part * BLOCK_K, T, K, L, BLOCK_K)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            num = tl.dot(q, C[part].to(q.dtype), num, input_precision=PRECISION)
            C_part = tl.dot(tl.trans(k), weighted_v, C[part] * kept, input_precision=PRECISION)
            C_next = C_next + (C_part,)
            if NORMALIZE:
                d += tl.sum(q * n[part][None, :], 1)
                n_next = n_next + (n[part] * kept + tl.sum(k * as_key[:, None], 0),)
        C = C_next
        scores *= weights_between(c, x, segment, False, L, HAS_RESETS)
        num = tl.dot(scores.to(v.dtype), v, num * as_query[:, None], input_precision=PRECISION)
        m = tl.load(m_ptr + first + t + 1, inside, 0.0)
        if NORMALIZE:
            n = n_next
            d = (tl.sum(scores, 1) + d * as_query) * scale
            h = num * (scale / normalizer(d, m, eps))[:, None]
            if block == 0:
                tl.store(d_ptr + first + t, d, inside)
        else:
            h = num * (scale * tl.exp2(m))[:, None]
        store_tile(h_ptr, h_strides, first, block * BLOCK_V, T, h, V, L, BLOCK_V)


def walk_forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    borders: Borders,
    plan: Plan,
    launch: Launch,
    *,
    has_state: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, V) and the normalizer d (B, H, T; without content unless `normalize`) from the states at the borders,
    the first of which counts if `has_state`."""
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[-1]
    h_BTHV = torch.empty_like(v_BTHV)
    d_BHT = torch.empty_like(gates.x_BHT)
    forward_kernel[(B * H * plan.supers(T) * triton.cdiv(V, launch.block_v),)](
        q_BTHK,
        k_BTHK,
        v_BTHV,
        gates.c_BHT,
        gates.x_BHT,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        *borders,
        h_BTHV,
        d_BHT,
        q_BTHK.stride(),
        k_BTHK.stride(),
        v_BTHV.stride(),
        h_BTHV.stride(),
        T,
        H,
        plan.chunks,
        int(has_state),
        eps,
        K**-0.5,
        K=K,
        V=V,
        L=plan.L,
        BLOCK_K=launch.block_k,
        BLOCK_V=launch.block_v,
        PARTS=triton.cdiv(K, launch.block_k),
        NORMALIZE=normalize,
        HAS_RESETS=gates.segment_BT1 is not None,
        PRECISION=plan.precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return h_BTHV, d_BHT
