"""Triton kernels for the mLSTM's state, or its gradient, before the walks: C between super-chunks, n between chunks.

Each stretch first adds up, from an empty state and in parallel with all others, what it contributes to the state after
it; then a scan over the stretches joins them. For the gradient the same happens backwards in time: the state (keys x
values) of keys k and values v becomes that of "keys" q and "values" dh, and n that of q weighted by delta.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.gpu import padded
from xlstm_lm.ops.mlstm.triton_gates import Gates
from xlstm_lm.ops.mlstm.triton_launch import Launch, Plan
from xlstm_lm.ops.mlstm.triton_tiles import chunk_weights, join_stretches, load_tile


@triton.jit(do_not_specialize=["T", "H", "supers", "first_super", "count", "chunks"])
def contributions_kernel(
    k_ptr,
    v_ptr,
    c_ptr,
    x_ptr,
    x_query_ptr,
    m_ptr,
    segment_ptr,
    C_ptr,
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
    """One block of what super-chunk `first_super` + 0 .. `count` - 1 adds to C at its end (or start, in REVERSE, where
    k and v are q and dh)."""
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
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)

    C = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
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
        query, key, kept_here = chunk_weights(c_ptr, x_ptr, x_query_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS)
        weight = query if REVERSE else key
        C = tl.dot(tl.trans(k), (v * weight[:, None]).to(k.dtype), C * kept_here, input_precision=PRECISION)
        kept *= kept_here

    border = pair * (supers + 1) + super_chunk
    if block == 0:
        tl.store(kept_ptr + pair * supers + super_chunk, kept)
    if not REVERSE:
        border += 1
    key_index = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    value_index = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (key_index < K)[:, None] & (value_index < V)[None, :]
    tl.store(C_ptr + border * K * V + key_index[:, None] * V + value_index[None, :], C, mask)


@triton.jit(do_not_specialize=["T", "H"])
def key_sums_kernel(
    k_ptr,
    c_ptr,
    x_ptr,
    x_query_ptr,
    m_ptr,
    segment_ptr,
    delta_ptr,
    n_ptr,
    kept_ptr,
    k_strides,
    T,
    H,
    K: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """The sum that one chunk adds to n at its end (or start, in REVERSE, where k is q, weighted by delta too)."""
    chunks = tl.cdiv(T, L)
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // chunks, (program % chunks).to(tl.int32)
    row, head = pair // H, pair % H
    first = chunk * L
    query, key, kept = chunk_weights(
        c_ptr + pair * T,
        x_ptr + pair * T,
        x_query_ptr + pair * T,
        m_ptr + pair * (T + 1),
        segment_ptr + row * (T + 1),
        first,
        T,
        L,
        HAS_RESETS,
    )
    weight = key
    if REVERSE:
        t = first + tl.arange(0, L)
        weight = query * tl.load(delta_ptr + pair * T + t, t < T, 0.0)
    k_ptr += row * k_strides[0] + head * k_strides[2]
    k = load_tile(k_ptr, k_strides, first, 0, T, K, L, BLOCK_K)
    border = pair * (chunks + 1) + chunk
    if not REVERSE:
        border += 1
    entry = tl.arange(0, BLOCK_K)
    tl.store(n_ptr + border * K + entry, tl.sum(k * weight[:, None], 0), entry < K)
    tl.store(kept_ptr + pair * chunks + chunk, kept)


@triton.jit(do_not_specialize=["stretches", "first_stretch", "count"])
def join_kernel(
    state_ptr,
    kept_ptr,
    stretches,
    first_stretch,
    count,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Add to what each stretch contributes what is left of the state on its other side, ROWS stretches at a time."""
    blocks = tl.cdiv(SIZE, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    pair = program // blocks
    entry = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    row = tl.arange(0, ROWS)
    edge = first_stretch + count if REVERSE else first_stretch
    state_ptr += pair * (stretches + 1) * SIZE
    kept_ptr += pair * stretches
    state = tl.load(state_ptr + edge.to(tl.int64) * SIZE + entry, inside, 0.0)
    for done in range(0, count, ROWS):
        there = row < count - done
        stretch = first_stretch + done + row
        if REVERSE:
            stretch = first_stretch + count - 1 - done - row
        border = stretch if REVERSE else stretch + 1
        here = state_ptr + border.to(tl.int64)[:, None] * SIZE + entry[None, :]
        mask = there[:, None] & inside[None, :]
        kept = tl.load(kept_ptr + stretch, there, 1.0)[:, None] + tl.zeros([ROWS, BLOCK], tl.float32)
        kept, added = tl.associative_scan((kept, tl.load(here, mask, 0.0)), 0, join_stretches)
        joined = kept * state[None, :] + added
        tl.store(here, joined, mask)
        state = tl.sum(tl.where((row == ROWS - 1)[:, None], joined, 0.0), 0)


def _join(state: Tensor, kept: Tensor, first: int, count: int, rows: int, block: int, *, reverse: bool) -> None:
    size = state[0, 0, 0].numel()
    block = min(block, triton.next_power_of_2(size))
    join_kernel[(state.shape[0] * state.shape[1] * triton.cdiv(size, block),)](
        state, kept, kept.shape[2], first, count, SIZE=size, BLOCK=block, ROWS=rows, REVERSE=reverse, num_warps=4
    )


def border_states(
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    C_BHKV: Tensor | None,
    plan: Plan,
    launch: Launch,
    *,
    x_query_BHT: Tensor,
    reverse: bool = False,
    to_the_end: bool,
) -> Tensor:
    """C at each of the S + 1 borders of S super-chunks (B, H, S + 1, K, V), float32, from `C_BHKV` before the first
    step (None if empty).

    With `reverse` its gradient, from that of C after the last step, for k = q and v = dh. `x_query_BHT`: x_divided.
    Without `to_the_end` the last border on the way is left without content.
    """
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    S = plan.supers(T)
    C_BHSKV = k_BTHK.new_empty(B, H, S + 1, K, V, dtype=torch.float32)
    C_BHSKV[:, :, S if reverse else 0] = 0.0 if C_BHKV is None else C_BHKV
    first_super, count = 0, S
    if not to_the_end:
        first_super, count = int(reverse), S - 1
    if count == 0:
        return C_BHSKV
    kept_BHS = torch.empty(B, H, S, dtype=torch.float32, device=k_BTHK.device)
    blocks = triton.cdiv(K, launch.block_k) * triton.cdiv(V, launch.block_v)
    contributions_kernel[(B * H * count * blocks,)](
        k_BTHK,
        v_BTHV,
        gates.c_BHT,
        gates.x_BHT,
        x_query_BHT,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        C_BHSKV,
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
    _join(C_BHSKV, kept_BHS, first_super, count, 4, 512, reverse=reverse)
    return C_BHSKV


def border_normalizers(
    k_BTHK: Tensor,
    gates: Gates,
    n_BHK: Tensor | None,
    L: int,
    *,
    x_query_BHT: Tensor | None = None,
    delta_BHT: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """n at each of the N + 1 borders of N chunks (B, H, N + 1, K), float32, from `n_BHK` before the first step (None if
    empty).

    With `reverse` its gradient, from that of n after the last step, for k = q, `x_query_BHT` = x_divided and delta.
    """
    B, T, H, K = k_BTHK.shape
    N = triton.cdiv(T, L)
    n_BHNK = torch.empty(B, H, N + 1, K, dtype=torch.float32, device=k_BTHK.device)
    n_BHNK[:, :, N if reverse else 0] = 0.0 if n_BHK is None else n_BHK
    kept_BHN = torch.empty(B, H, N, dtype=torch.float32, device=k_BTHK.device)
    key_sums_kernel[(B * H * N,)](
        k_BTHK,
        gates.c_BHT,
        gates.x_BHT,
        gates.x_BHT if x_query_BHT is None else x_query_BHT,
        gates.m_BHT1,
        gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
        gates.c_BHT if delta_BHT is None else delta_BHT,
        n_BHNK,
        kept_BHN,
        k_BTHK.stride(),
        T,
        H,
        K=K,
        L=L,
        BLOCK_K=padded(K),
        REVERSE=reverse,
        HAS_RESETS=gates.segment_BT1 is not None,
        num_warps=4,
    )
    _join(n_BHNK, kept_BHN, 0, N, 32, 64, reverse=reverse)
    return n_BHNK
