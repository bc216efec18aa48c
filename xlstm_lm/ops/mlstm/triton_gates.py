"""Triton kernels on one number a step and head: the weights from the gates, before the mLSTM's products, and the gates'
gradients, after them.

Exponents are kept in base 2. Within a chunk of L steps let b be the running sum of the log forget gates and m_t the
recurrent stabilizer. Step s counts exp2(c_s - x_t) at a later step t of its chunk, with c = log input gate - b and
x = m - b; the state before the chunk counts exp2(m_before - x_t), and step s counts exp2(c_s - x_last) in the state
after it. (Chunkwise form: arXiv 2503.14376.)

Sequences of "borders" have T + 1 entries: entry t stands before step t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_tiles import join_stretches

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(-3.4028234663852886e38)
BLOCK = 512
"""Steps that one program of these kernels takes at a time."""
STRIDES = ("i_row", "i_step", "i_head", "f_row", "f_step", "f_head")
"""Arguments that depend on the batch: the kernels compiled for a check are those of training."""


class Gates(NamedTuple):
    """The weights that the products need, all but `segment` float32 (B, H, ...)."""

    c_BHT: Tensor
    """Log weight of a step's key."""
    x_BHT: Tensor
    """Number subtracted from c at the step that reads."""
    m_BHT1: Tensor
    """Stabilizer at each border."""
    segment_BT1: Tensor | None
    """Number of resets up to each border, int32; None without resets."""


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)), to full precision at both ends."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def log2_sigmoid(x):
    return log_sigmoid(x) * LOG2E


@triton.jit
def _later(forget_1, m_1, forget_2, m_2):
    """Two spans of steps as one: what it forgets, and the stabilizer after it from an empty state."""
    return forget_1 + forget_2, tl.maximum(m_1 + forget_2, m_2)


@triton.jit(do_not_specialize=[*STRIDES, "T", "H"])
def gates_kernel(
    i_ptr,
    f_ptr,
    segment_ptr,
    c_ptr,
    x_ptr,
    m_ptr,
    i_row,
    i_step,
    i_head,
    f_row,
    f_step,
    f_head,
    T,
    H,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """One head's c, x and m from its gates, all steps in order. The first entry of m is there already."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // H, pair % H
    i_ptr += row * i_row + head * i_head
    f_ptr += row * f_row + head * f_head
    segment_ptr += row * (T + 1)
    c_ptr += pair * T
    x_ptr += pair * T
    m_ptr += pair * (T + 1)
    m_before = tl.load(m_ptr)
    for first in range(0, T, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = t < T
        log_input = tl.load(i_ptr + t.to(tl.int64) * i_step, inside, float("-inf")).to(tl.float32)
        forget = tl.load(f_ptr + t.to(tl.int64) * f_step, inside, 0.0).to(tl.float32)
        log_forget = tl.where(inside, log2_sigmoid(forget), 0.0)
        if SIGMOID:
            log_input = log2_sigmoid(log_input)
        else:
            log_input = log_input * LOG2E
        passing = log_forget
        if HAS_RESETS:
            restarts = tl.load(segment_ptr + t, inside, 0) != tl.load(segment_ptr + t + 1, inside, 0)
            passing = tl.where(restarts, float("-inf"), log_forget)
            log_forget = tl.where(restarts, 0.0, log_forget)  # what is forgotten is empty already
        b = tl.reshape(tl.cumsum(tl.reshape(log_forget, [BLOCK // L, L]), 1), [BLOCK])
        if SIGMOID:
            m = tl.zeros([BLOCK], tl.float32)
        else:
            passed, m = tl.associative_scan((passing, log_input), 0, _later)
            m = tl.maximum(tl.maximum(m, passed + m_before), SMALLEST)
            m_before = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, m, 0.0))
        tl.store(c_ptr + t, log_input - b, inside)
        tl.store(x_ptr + t, m - b, inside)
        tl.store(m_ptr + t + 1, m, inside)


@triton.jit(do_not_specialize=[*STRIDES, "T", "H", "steps", "pairs", "has_border"])
def gate_gradients_kernel(
    i_ptr,
    f_ptr,
    segment_ptr,
    q_dq_ptr,
    k_dk_ptr,
    border_ptr,
    di_ptr,
    df_ptr,
    i_row,
    i_step,
    i_head,
    f_row,
    f_step,
    f_head,
    T,
    H,
    steps,
    pairs,
    has_border,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """The gradients of both gates in one super-chunk of `steps` steps, last steps first.

    Step t's log forget gate acts on all that later steps get from earlier ones: within the super-chunk that is the
    sum of q . dq - k . dk from t on, beyond it the product of the state at the border and its gradient. A document's
    sum ends with it: that of the next one is 0 but for rounding, which would count for this one.
    """
    supers = tl.cdiv(T, steps)
    program = tl.program_id(0).to(tl.int64)
    pair, super_chunk = program // supers, (program % supers).to(tl.int32)
    row, head = pair // H, pair % H
    i_ptr += row * i_row + head * i_head
    f_ptr += row * f_row + head * f_head
    di_ptr += row * T * H + head
    df_ptr += row * T * H + head
    segment_ptr += row * (T + 1)
    beyond = 0.0
    if has_border:
        beyond = tl.load(border_ptr + pair * (supers + 1) + super_chunk + 1)
    end = tl.minimum((super_chunk + 1) * steps, T)
    blocks = tl.cdiv(end - super_chunk * steps, BLOCK)
    back = tl.arange(0, BLOCK)
    for block in range(blocks):
        t = super_chunk * steps + (blocks - block) * BLOCK - 1 - back
        inside = t < end
        k_dk = tl.zeros([BLOCK], tl.float32)
        for part in range(PARTS):  # not unrolled: with 64 parts, their loads would fill all registers
            k_dk += tl.load(k_dk_ptr + (part * tl.cast(pairs, tl.int64) + pair) * T + t, inside, 0.0)
        difference = tl.load(q_dq_ptr + pair * T + t, inside, 0.0) - k_dk
        if HAS_RESETS:
            segment = tl.load(segment_ptr + t + 1, inside, 0)
            goes_on = tl.load(segment_ptr + t + 2, inside & (t + 1 < T), segment) == segment
            kept, dforget = tl.associative_scan((tl.where(goes_on, 1.0, 0.0), difference), 0, join_stretches)
            dforget += kept * beyond
        else:
            dforget = tl.cumsum(difference, 0) + beyond
        beyond = tl.sum(tl.where(back == BLOCK - 1, dforget, 0.0))
        t_long = t.to(tl.int64)
        dforget *= tl.sigmoid(-tl.load(f_ptr + t_long * f_step, inside, 0.0).to(tl.float32))
        if HAS_RESETS:
            dforget = tl.where(tl.load(segment_ptr + t, inside, 0) == segment, dforget, 0.0)
        if SIGMOID:
            k_dk *= tl.sigmoid(-tl.load(i_ptr + t_long * i_step, inside, 0.0).to(tl.float32))
        tl.store(di_ptr + t_long * H, k_dk.to(di_ptr.dtype.element_ty), inside)
        tl.store(df_ptr + t_long * H, dforget.to(df_ptr.dtype.element_ty), inside)


def count_resets(resets_BT: Tensor | None) -> Tensor | None:
    """`Gates.segment_BT1`."""
    return None if resets_BT is None else torch.nn.functional.pad(resets_BT.cumsum(1, dtype=torch.int32), (1, 0))


def make_gates(
    i_BTH: Tensor, f_BTH: Tensor, segment_BT1: Tensor | None, m_BH: Tensor | None, L: int, *, sigmoid: bool
) -> Gates:
    """The weights of chunks of L steps (a divisor of 512), from the gates and the stabilizer before the first step."""
    assert BLOCK % L == 0
    B, T, H = i_BTH.shape
    c_BHT, x_BHT = (torch.empty(B, H, T, dtype=torch.float32, device=i_BTH.device) for _ in range(2))
    m_BHT1 = torch.empty(B, H, T + 1, dtype=torch.float32, device=i_BTH.device)
    if m_BH is None or sigmoid:
        m_BHT1[..., 0] = 0.0 if sigmoid else float("-inf")
    else:
        m_BHT1[..., 0] = m_BH * LOG2E.value
    gates_kernel[(B * H,)](
        i_BTH,
        f_BTH,
        c_BHT if segment_BT1 is None else segment_BT1,
        c_BHT,
        x_BHT,
        m_BHT1,
        *i_BTH.stride(),
        *f_BTH.stride(),
        T,
        H,
        L=L,
        BLOCK=BLOCK,
        SIGMOID=sigmoid,
        HAS_RESETS=segment_BT1 is not None,
        num_warps=4,
    )
    return Gates(c_BHT, x_BHT, m_BHT1, segment_BT1)


def gate_gradients(
    i_BTH: Tensor,
    f_BTH: Tensor,
    gates: Gates,
    q_dq_BHT: Tensor,
    k_dk_PBHT: Tensor,
    border_BHS1: Tensor | None,
    steps: int,
    *,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of i and f: from k . dk in P parts, q . dq, and at each border the product of the state and its
    gradient (None where no super-chunk of `steps` steps is followed by anything)."""
    B, T, H = i_BTH.shape
    di_BTH, df_BTH = i_BTH.new_empty(B, T, H), f_BTH.new_empty(B, T, H)
    segment = gates.c_BHT if gates.segment_BT1 is None else gates.segment_BT1
    gate_gradients_kernel[(B * H * triton.cdiv(T, steps),)](
        i_BTH,
        f_BTH,
        segment,
        q_dq_BHT,
        k_dk_PBHT,
        q_dq_BHT if border_BHS1 is None else border_BHS1,
        di_BTH,
        df_BTH,
        *i_BTH.stride(),
        *f_BTH.stride(),
        T,
        H,
        steps,
        B * H,
        int(border_BHS1 is not None),
        PARTS=k_dk_PBHT.shape[0],
        BLOCK=BLOCK,
        SIGMOID=sigmoid,
        HAS_RESETS=gates.segment_BT1 is not None,
        num_warps=4,
    )
    return di_BTH, df_BTH
