"""Triton kernel for the gradients of q, k and v: the same walk through a super-chunk, three times.

Let v have one more entry that is always 1, and dh one more that is delta, the gradient of the normalizer d (both in
units of what num is divided by). Then the normalizer is an entry of num, its gradients need no terms of their own, and
with readers r, sources s and what they carry w, all three gradients are outputs of the form

    out_a = sum over b of (r_a . s_b) weight(a, b) w_b + what older (or later) chunks left in a state of s w^T

    dq: r = dh, s = v, w = k, forward in time        (the state is C^T)
    dk: r = v, s = dh, w = q, backward in time       (the state is dC^T)
    dv: r = k, s = q, w = dh, backward in time       (the state is dC)

which is how the output h itself comes about, from r = q, s = k, w = v.
"""

# ruff: noqa: RUF005 (Triton knows no starred expressions)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_gates import Gates, chunk_weights, load_tile, store_tile, weights_between
from xlstm_lm.ops.mlstm.triton_launch import Launch, Plan
from xlstm_lm.ops.mlstm.triton_states import Borders


class Rows(NamedTuple):
    """What the gradients need of each output row, float32: see `triton_gates.rows_kernel`."""

    x_divided_BHT: Tensor
    delta_BHT: Tensor


@triton.jit(do_not_specialize=["T", "chunks", "has_state"])
def backward_kernel(
    r_ptr,
    s_ptr,
    w_ptr,
    other_ptr,
    c_ptr,
    x_ptr,
    x_divided_ptr,
    delta_ptr,
    m_ptr,
    segment_ptr,
    state_ptr,
    n_ptr,
    out_ptr,
    product_ptr,
    r_strides,
    s_strides,
    w_strides,
    other_strides,
    out_strides,
    state_strides,
    T,
    H,
    pairs,
    chunks,
    has_state,
    S: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of `out` (the width W of w) in one super-chunk; S is the width of r and s.

    HAS_NORMALIZER: r and s are dh and v, or v and dh, with their one more entry. HAS_PRODUCT: write this block's part
    of the product of out and `other` as well.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    supers = tl.cdiv(tl.cdiv(T, L), chunks)
    program = tl.program_id(0).to(tl.int64)
    block, rest = (program % blocks).to(tl.int32), program // blocks
    super_chunk, pair = (rest % supers).to(tl.int32), rest // supers
    row, head = pair // H, pair % H
    carried = block * BLOCK_W + tl.arange(0, BLOCK_W)
    r_ptr += row * r_strides[0] + head * r_strides[2]
    s_ptr += row * s_strides[0] + head * s_strides[2]
    w_ptr += row * w_strides[0] + head * w_strides[2]
    other_ptr += row * other_strides[0] + head * other_strides[2]
    out_ptr += row * out_strides[0] + head * out_strides[2]
    product_ptr += (block * tl.cast(pairs, tl.int64) + pair) * T
    c_ptr += pair * T
    x_ptr += pair * T
    x_divided_ptr += pair * T
    delta_ptr += pair * T
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)

    border = pair * (supers + 1) + super_chunk
    if REVERSE:
        border += 1
        there = (super_chunk < supers - 1) | (has_state != 0)
    else:
        there = (super_chunk > 0) | (has_state != 0)
    state = ()
    for part in tl.static_range(PARTS):
        entry = part * BLOCK_S + tl.arange(0, BLOCK_S)
        state_part = tl.zeros([BLOCK_S, BLOCK_W], tl.float32)
        if there:
            state_part = tl.load(
                state_ptr + border * S * W + entry[:, None] * state_strides[0] + carried[None, :] * state_strides[1],
                (entry < S)[:, None] & (carried < W)[None, :],
                0.0,
            )
        state = state + (state_part,)
    n = tl.zeros([BLOCK_W], tl.float32)
    if HAS_NORMALIZER and there:
        n = tl.load(n_ptr + border * W + carried, carried < W, 0.0)
    begin = super_chunk * chunks
    end = tl.minimum(begin + chunks, tl.cdiv(T, L))
    for index in range(begin, end):
        chunk = index
        if REVERSE:
            chunk = end - 1 - (index - begin)
        first = chunk * L
        t = tl.arange(0, L)
        inside = first + t < T
        w = load_tile(w_ptr, w_strides, first, block * BLOCK_W, T, W, L, BLOCK_W)
        c, x, segment, as_query, as_key, kept = chunk_weights(
            c_ptr, x_ptr, x_divided_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS
        )
        reading, adding = as_query, as_key
        if REVERSE:
            reading, adding = as_key, as_query
        weighted_w = (w * adding[:, None]).to(w.dtype)
        scores = tl.zeros([L, L], tl.float32)
        out = tl.zeros([L, BLOCK_W], tl.float32)
        state_next = ()
        for part in tl.static_range(PARTS):
            r = load_tile(r_ptr, r_strides, first, part * BLOCK_S, T, S, L, BLOCK_S)
            s = load_tile(s_ptr, s_strides, first, part * BLOCK_S, T, S, L, BLOCK_S)
            scores = tl.dot(r, tl.trans(s), scores, input_precision=PRECISION)
            out = tl.dot(r, state[part].to(r.dtype), out, input_precision=PRECISION)
            state_part = tl.dot(tl.trans(s), weighted_w, state[part] * kept, input_precision=PRECISION)
            state_next = state_next + (state_part,)
        state = state_next
        if HAS_NORMALIZER:
            delta = tl.load(delta_ptr + first + t, inside, 0.0)
            scores += delta[None, :] if REVERSE else delta[:, None]
        scores *= weights_between(c, x, segment, REVERSE, L, HAS_RESETS)
        out = tl.dot(scores.to(w.dtype), w, out * reading[:, None], input_precision=PRECISION)
        if HAS_NORMALIZER:
            out += (reading if REVERSE else reading * delta)[:, None] * n[None, :]
            n = n * kept + tl.sum(w * (adding * delta if REVERSE else adding)[:, None], 0)
        if HAS_PRODUCT:
            other = load_tile(other_ptr, other_strides, first, block * BLOCK_W, T, W, L, BLOCK_W)
            tl.store(product_ptr + first + t, tl.sum(out * other, 1), inside)
        store_tile(out_ptr, out_strides, first, block * BLOCK_W, T, out, W, L, BLOCK_W)


def _walk(
    r_BTHS: Tensor,
    s_BTHS: Tensor,
    w_BTHW: Tensor,
    like_BTHW: Tensor,
    gates: Gates,
    rows: Rows,
    borders: Borders,
    state_strides: tuple[int, int],
    plan: Plan,
    launch: Launch,
    *,
    reverse: bool,
    has_state: bool,
    has_normalizer: bool,
    other_BTHW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, H, W = w_BTHW.shape
    blocks = triton.cdiv(W, launch.block_v)
    out_BTHW = torch.empty_like(like_BTHW)
    product_PBHT = gates.x_BHT.new_empty(blocks if other_BTHW is not None else 0, B, H, T)
    other = w_BTHW if other_BTHW is None else other_BTHW
    backward_kernel[(B * H * plan.supers(T) * blocks,)](
        r_BTHS,
        s_BTHS,
        w_BTHW,
        other,
        gates.c_BHT,
        gates.x_BHT,
        *rows,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        *borders,
        out_BTHW,
        gates.x_BHT if other_BTHW is None else product_PBHT,
        r_BTHS.stride(),
        s_BTHS.stride(),
        w_BTHW.stride(),
        other.stride(),
        out_BTHW.stride(),
        state_strides,
        T,
        H,
        B * H,
        plan.chunks,
        int(has_state),
        S=r_BTHS.shape[-1],
        W=W,
        L=plan.L,
        BLOCK_S=launch.block_k,
        BLOCK_W=launch.block_v,
        PARTS=triton.cdiv(r_BTHS.shape[-1], launch.block_k),
        REVERSE=reverse,
        HAS_NORMALIZER=has_normalizer,
        HAS_PRODUCT=other_BTHW is not None,
        HAS_RESETS=gates.segment_BT1 is not None,
        PRECISION=plan.precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out_BTHW, product_PBHT


def walk_for_dq(
    inputs: tuple[Tensor, Tensor, Tensor],
    dh_BTHV: Tensor,
    gates: Gates,
    rows: Rows,
    states: Borders,
    plan: Plan,
    launch: Launch,
    *,
    has_state: bool,
) -> Tensor:
    """Gradient of q, from the states at the borders, the first of which counts if `has_state`."""
    q_BTHK, k_BTHK, v_BTHV = inputs
    return _walk(
        dh_BTHV,
        v_BTHV,
        k_BTHK,
        q_BTHK,
        gates,
        rows,
        states,
        (1, v_BTHV.shape[-1]),
        plan,
        launch,
        reverse=False,
        has_state=has_state,
        has_normalizer=True,
    )[0]


def walk_for_dk(
    inputs: tuple[Tensor, Tensor, Tensor],
    dh_BTHV: Tensor,
    gates: Gates,
    rows: Rows,
    dstates: Borders,
    plan: Plan,
    launch: Launch,
    *,
    has_state: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of k, and k . dk in as many parts as K has blocks (P, B, H, T); the last of `dstates` counts if
    `has_state`."""
    q_BTHK, k_BTHK, v_BTHV = inputs
    return _walk(
        v_BTHV,
        dh_BTHV,
        q_BTHK,
        k_BTHK,
        gates,
        rows,
        dstates,
        (1, v_BTHV.shape[-1]),
        plan,
        launch,
        reverse=True,
        has_state=has_state,
        has_normalizer=True,
        other_BTHW=k_BTHK,
    )


def walk_for_dv(
    inputs: tuple[Tensor, Tensor, Tensor],
    dh_BTHV: Tensor,
    gates: Gates,
    rows: Rows,
    dstates: Borders,
    plan: Plan,
    launch: Launch,
    *,
    has_state: bool,
) -> Tensor:
    """Gradient of v; the last of `dstates` counts if `has_state`."""
    q_BTHK, k_BTHK, v_BTHV = inputs
    return _walk(
        k_BTHK,
        q_BTHK,
        dh_BTHV,
        v_BTHV,
        gates,
        rows,
        dstates,
        (dh_BTHV.shape[-1], 1),
        plan,
        launch,
        reverse=True,
        has_state=has_state,
        has_normalizer=False,
    )[0]
