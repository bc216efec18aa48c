"""Triton kernel for the mLSTM's output and the gradients of q, k and v: one walk through each super-chunk.

A program has one super-chunk of one head and a block of columns. It starts from the state at the border and computes
chunk after chunk: the output from the steps of the chunk and from the state before it, then the state after it. The
state thus stays in registers within a super-chunk.

Let v have one more entry that is always 1, and dh one more that is delta, the gradient of the normalizer d (both in
units of what num is divided by). Then the normalizer is an entry of num, its gradients need no terms of their own, and
with readers r, sources s and what they carry w, the output and all three gradients have the form

    out_a = sum over b of scores(a, b) w_b + what older (or later) chunks left in a state of s w^T

    h:  r = q, s = k, w = v, forward in time, scores (r . s) weight(a, b)   (the state is C)
    dq: r = dh, s = v, w = k, forward in time                              (the state is C^T)
    dk: r = v, s = dh, w = q, backward in time, where b reads and a is read (the state is dC^T)
    dv: r = k, s = q, w = dh, backward in time, with the scores of h        (the state is dC)

where the scores are those of `triton_scores`, and the state's last entry is n, of `triton_states.border_normalizers`.
Everything is computed transposed: the state is then a product's left operand, the one that can stay in registers.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_autotune import best_launch
from xlstm_lm.ops.mlstm.triton_gates import Gates
from xlstm_lm.ops.mlstm.triton_launch import Launch, Plan
from xlstm_lm.ops.mlstm.triton_tiles import chunk_weights, load_tile, store_tile

SMALLEST_UNIT = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["T", "H", "pairs", "chunks"])
def walk_kernel(
    r_ptr,
    s_ptr,
    w_ptr,
    other_ptr,
    scores_ptr,
    c_ptr,
    x_ptr,
    x_divided_ptr,
    delta_ptr,
    m_ptr,
    segment_ptr,
    state_ptr,
    reach_ptr,
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
    """One block of `out` (the width W of w) in one super-chunk of `chunks` chunks; S is the width of r and s.

    HAS_NORMALIZER: r and s are dh and v, or v and dh, with their one more entry. HAS_PRODUCT: write this block's part
    of the product of out and `other` as well.

    float16 ends at 65504, but a sum over thousands of steps does not: in its products the state counts in a power of
    two by which it stays below. `largest` is what it cannot exceed: a step adds its weight times `reach` at most.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    all_chunks = tl.cdiv(T, L)
    supers = tl.cdiv(all_chunks, chunks)
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
    scores_ptr += pair * all_chunks * L * L
    n_ptr += pair * (all_chunks + 1) * W
    c_ptr += pair * T
    x_ptr += pair * T
    x_divided_ptr += pair * T
    delta_ptr += pair * T
    m_ptr += pair * (T + 1)
    segment_ptr += row * (T + 1)

    border = pair * (supers + 1) + super_chunk
    if REVERSE:
        border += 1
    HALF: tl.constexpr = r_ptr.dtype.element_ty == tl.float16
    largest = SMALLEST_UNIT
    if HALF:
        reach = tl.load(reach_ptr + pair)
    state = ()
    for part in tl.static_range(PARTS):
        entry = part * BLOCK_S + tl.arange(0, BLOCK_S)
        state_part = tl.load(
            state_ptr + border * S * W + entry[None, :] * state_strides[0] + carried[:, None] * state_strides[1],
            (entry < S)[None, :] & (carried < W)[:, None],
            0.0,
        )
        if HALF:
            largest = tl.maximum(largest, tl.max(tl.abs(state_part)))
        state = state + (state_part,)  # type: ignore[assignment] # Triton unrolls the loop
    begin = super_chunk * chunks
    end = tl.minimum(begin + chunks, all_chunks)
    for index in range(begin, end):
        chunk = index
        if REVERSE:
            chunk = end - 1 - (index - begin)
        first = chunk * L
        step = tl.arange(0, L)
        t = first + step
        query, key, kept = chunk_weights(c_ptr, x_ptr, x_divided_ptr, m_ptr, segment_ptr, first, T, L, HAS_RESETS)
        reading, adding = query, key
        if REVERSE:
            reading, adding = key, query
        w = load_tile(w_ptr, w_strides, first, block * BLOCK_W, T, W, L, BLOCK_W)
        weighted_w = tl.trans((w * adding[:, None]).to(w.dtype))
        left = tl.zeros([BLOCK_W, L], tl.float32)
        unit = 1.0
        if HALF:
            unit = tl.exp2(tl.floor(tl.log2(largest)) - 14.0)
            largest = tl.maximum(largest * kept + reach * tl.sum(adding), SMALLEST_UNIT)
        state_next = ()
        for part in tl.static_range(PARTS):
            r = load_tile(r_ptr, r_strides, first, part * BLOCK_S, T, S, L, BLOCK_S)
            s = load_tile(s_ptr, s_strides, first, part * BLOCK_S, T, S, L, BLOCK_S)
            left = tl.dot(
                (state[part] * (1.0 / unit)).to(r.dtype),  # type: ignore[attr-defined] # a Triton block, not a float
                tl.trans(r),
                left,
                input_precision=PRECISION,
            )
            state_part = tl.dot(weighted_w, s, state[part] * kept, input_precision=PRECISION)
            state_next = state_next + (state_part,)  # type: ignore[assignment] # Triton unrolls the loop
        state = state_next
        left *= unit
        if HAS_NORMALIZER:
            n = tl.load(n_ptr + (chunk + REVERSE).to(tl.int64) * W + carried, carried < W, 0.0)
            if REVERSE:
                left += n[:, None]
            else:
                left += n[:, None] * tl.load(delta_ptr + t, t < T, 0.0)[None, :]
        scores = tl.load(scores_ptr + first.to(tl.int64) * L + step[:, None] * L + step[None, :])
        if not REVERSE:
            scores = tl.trans(scores)
        out = tl.trans(tl.dot(tl.trans(w), scores, left * reading[None, :], input_precision=PRECISION))
        if HAS_PRODUCT:
            other = load_tile(other_ptr, other_strides, first, block * BLOCK_W, T, W, L, BLOCK_W)
            tl.store(product_ptr + t, tl.sum(out * other, 1), t < T)
        store_tile(out_ptr, out_strides, first, block * BLOCK_W, T, out, W, L, BLOCK_W)


def walk(
    r_BTHS: Tensor,
    s_BTHS: Tensor,
    w_BTHW: Tensor,
    like_BTHW: Tensor,
    scores_BHNLL: Tensor,
    state: Tensor,
    gates: Gates,
    x_divided_BHT: Tensor,
    plan: Plan,
    launch: Launch,
    *,
    transposed: bool,
    reverse: bool = False,
    n_BHNW: Tensor | None = None,
    delta_BHT: Tensor | None = None,
    other_BTHW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, W) with the strides of `like_BTHW`, and its product with `other_BTHW`, if given, in as many parts
    as W has blocks (P, B, H, T).

    `state` (B, H, supers + 1, S, W, or W, S if `transposed`) is that at the borders of super-chunks. `n_BHNW` is its
    one more row at the borders of chunks, where r and s have one more entry: 1 in one, `delta_BHT` in the other.
    """
    B, T, H, W = w_BTHW.shape
    S = r_BTHS.shape[-1]
    other = w_BTHW if other_BTHW is None else other_BTHW
    reach_BH = gates.x_BHT
    if r_BTHS.dtype == torch.float16:
        reach_BH = _largest(s_BTHS) * _largest(w_BTHW)

    def run(launch: Launch) -> tuple[Tensor, Tensor]:
        blocks = triton.cdiv(W, launch.block_v)
        out_BTHW = torch.empty_like(like_BTHW)
        product_PBHT = gates.x_BHT.new_empty(0 if other_BTHW is None else blocks, B, H, T)
        walk_kernel[(B * H * plan.supers(T) * blocks,)](
            r_BTHS,
            s_BTHS,
            w_BTHW,
            other,
            scores_BHNLL,
            gates.c_BHT,
            gates.x_BHT,
            x_divided_BHT,
            gates.x_BHT if delta_BHT is None else delta_BHT,
            gates.m_BHT1,
            gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1,
            state,
            reach_BH,
            gates.x_BHT if n_BHNW is None else n_BHNW,
            out_BTHW,
            gates.x_BHT if other_BTHW is None else product_PBHT,
            r_BTHS.stride(),
            s_BTHS.stride(),
            w_BTHW.stride(),
            other.stride(),
            out_BTHW.stride(),
            (1, S) if transposed else (W, 1),
            T,
            H,
            B * H,
            plan.chunks,
            S=S,
            W=W,
            L=plan.L,
            BLOCK_S=launch.block_k,
            BLOCK_W=launch.block_v,
            PARTS=triton.cdiv(S, launch.block_k),
            REVERSE=reverse,
            HAS_NORMALIZER=n_BHNW is not None,
            HAS_PRODUCT=other_BTHW is not None,
            HAS_RESETS=gates.segment_BT1 is not None,
            PRECISION=plan.precision,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        return out_BTHW, product_PBHT

    kind = f"walk{' back' if reverse else ''}{' for k' if other_BTHW is not None else ''}"
    return run(best_launch(kind, launch, (plan.L, S, W), w_BTHW, lambda each: run(each)[0]))


def _largest(x_BTHX: Tensor) -> Tensor:
    """The largest magnitude of each head's entries, in float32 (B, H)."""
    return torch.linalg.vector_norm(x_BTHX, torch.inf, dim=(1, 3), dtype=torch.float32).contiguous()
