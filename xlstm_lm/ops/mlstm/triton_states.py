"""Triton kernels for the mLSTM's state, or its gradient, at the borders between super-chunks.

Each super-chunk first adds up, from an empty state and in parallel with all others, what it contributes to the state
after it; then one short scan over the super-chunks joins them. For the gradient the same happens backwards in time:
the state (keys x values) of keys k and values v becomes that of "keys" q and "values" dh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_gates import Gates, chunk_weights, load_tile
from xlstm_lm.ops.mlstm.triton_launch import Launch, Plan

JOINED = 1024
"""Numbers of the state that one program of the scan carries."""


class Borders(NamedTuple):
    """The state, or its gradient, at each of the S + 1 borders of S super-chunks, float32. Without content where no
    one asked, and at an end where the state is empty."""

    C_BHSKV: Tensor
    n_BHSK: Tensor


@triton.jit(do_not_specialize=["T", "supers", "first_super", "count", "chunks"])
def contributions_kernel(
    k_ptr,
    v_ptr,
    c_ptr,
    x_ptr,
    x_query_ptr,
    m_ptr,
    segment_ptr,
    delta_ptr,
    C_ptr,
    n_ptr,
    kept_ptr,
    k_strides,
    v_strides,
    T,
    H,
    supers,
    first_super,
    count,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of what super-chunk `first_super` + 0 .. `count` - 1 adds to the state at its end (or start, in
    REVERSE, where k and v are q and dh)."""
    blocks_v = tl.cdiv(V, BLOCK_V)
    blocks = tl.cdiv(K, BLOCK_K) * blocks_v
    program = tl.program_id(0).to(tl.int64)
    block, rest = (program % blocks).to(tl.int32), program // blocks
    super_chunk, pair = first_super + (rest % count).to(tl.int32), rest // count
    row, head = pair // H, pair % H
    block_k, block_v = block // blocks_v, block % blocks_v
    k_ptr += row * k_strides[0] + head * k_strides[2]
    v_ptr += row * v_strides[0] + head * v_strides[2]
    c_ptr += pair * T
    x_ptr += pair * T
    x_query_ptr += pair * T
    delta_ptr += pair * T
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)

    C = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    n = tl.zeros([BLOCK_K], tl.float32)
    kept = 1.0
    begin = super_chunk * chunks
    end = tl.minimum(begin + chunks, tl.cdiv(T, L))
    for index in range(begin, end):
        chunk = index
        if REVERSE:
            chunk = end - 1 - (index - begin)
        first = chunk * L
        k = load_tile(k_ptr, k_strides, first, block_k * BLOCK_K, T, K, L, BLOCK_K)
        v = load_tile(v_ptr, v_strides, first, block_v * BLOCK_V, T, V, L, BLOCK_V)
        _, _, _, as_query, as_key, kept_here = chunk_weights(
            c_ptr, x_ptr, x_query_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS
        )
        weight = as_query if REVERSE else as_key
        C = tl.dot(tl.trans(k), (v * weight[:, None]).to(k.dtype), C * kept_here, input_precision=PRECISION)
        if REVERSE:
            t = first + tl.arange(0, L)
            weight *= tl.load(delta_ptr + t, t < T, 0.0)
        n = n * kept_here + tl.sum(k * weight[:, None], 0)
        kept *= kept_here

    border = pair * (supers + 1) + super_chunk
    if block == 0:
        tl.store(kept_ptr + pair * supers + super_chunk, kept)
    if not REVERSE:
        border += 1
    key = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    value = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (key < K)[:, None] & (value < V)[None, :]
    tl.store(C_ptr + border * K * V + key[:, None] * V + value[None, :], C, mask)
    if block_v == 0:
        tl.store(n_ptr + border * K + key, n, key < K)


@triton.jit(do_not_specialize=["supers", "first_super", "count", "has_state"])
def join_kernel(
    state_ptr,
    kept_ptr,
    supers,
    first_super,
    count,
    has_state,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Add to what each super-chunk contributes what is left of the state on its other side, one after the other."""
    blocks = tl.cdiv(SIZE, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    pair = program // blocks
    entry = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    state_ptr += pair * (supers + 1) * SIZE + entry
    step = -1 if REVERSE else 1
    super_chunk = first_super + count - 1 if REVERSE else first_super
    border = super_chunk + 1 if REVERSE else super_chunk
    state = tl.zeros([BLOCK], tl.float32)
    if has_state:
        state = tl.load(state_ptr + border.to(tl.int64) * SIZE, inside, 0.0)
    for _ in range(count):
        border += step
        here = state_ptr + border.to(tl.int64) * SIZE
        state = state * tl.load(kept_ptr + pair * supers + super_chunk) + tl.load(here, inside, 0.0)
        tl.store(here, state, inside)
        super_chunk += step


def border_states(
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    edge: tuple[Tensor, Tensor] | None,
    plan: Plan,
    launch: Launch,
    *,
    x_query_BHT: Tensor | None = None,
    delta_BHT: Tensor | None = None,
    reverse: bool = False,
    to_the_end: bool,
) -> Borders:
    """The state at each border, from `edge`, the one before the first step (None if empty).

    With `reverse` its gradient, from that of the state after the last step, for k = q and v = dh and their
    `x_query_BHT` and `delta_BHT`. `to_the_end`: whether the last border on the way is asked for too.
    """
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    S = plan.supers(T)
    options = {"dtype": torch.float32, "device": k_BTHK.device}
    borders = Borders(torch.empty(B, H, S + 1, K, V, **options), torch.empty(B, H, S + 1, K, **options))
    if edge is not None:
        for x, x_edge in zip(borders, edge):
            x[:, :, S if reverse else 0] = x_edge
    first_super, count = 0, S
    if not to_the_end:
        first_super, count = int(reverse), S - 1
    if count == 0:
        return borders
    kept_BHS = torch.empty(B, H, S, **options)
    blocks = triton.cdiv(K, launch.block_k) * triton.cdiv(V, launch.block_v)
    contributions_kernel[(B * H * count * blocks,)](
        k_BTHK,
        v_BTHV,
        gates.c_BHT,
        gates.x_BHT,
        gates.x_BHT if x_query_BHT is None else x_query_BHT,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        gates.c_BHT if delta_BHT is None else delta_BHT,
        *borders,
        kept_BHS,
        k_BTHK.stride(),
        v_BTHV.stride(),
        T,
        H,
        S,
        first_super,
        count,
        plan.chunks,
        K=K,
        V=V,
        L=plan.L,
        BLOCK_K=launch.block_k,
        BLOCK_V=launch.block_v,
        REVERSE=reverse,
        HAS_RESETS=gates.segment_BT1 is not None,
        PRECISION=plan.precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    for x in borders:
        size = x[0, 0, 0].numel()
        join_kernel[(B * H * triton.cdiv(size, JOINED),)](
            x,
            kept_BHS,
            S,
            first_super,
            count,
            int(edge is not None),
            SIZE=size,
            BLOCK=min(JOINED, triton.next_power_of_2(size)),
            REVERSE=reverse,
            num_warps=4,
        )
    return borders
