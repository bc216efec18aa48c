"""Triton kernels for what an sLSTM step does to each unit alone, without the recurrent product.

They are one step of either loop (`batched`), and the cell run again from its checkpoints, all at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.mlstm.triton_gates import log_sigmoid
from xlstm_lm.ops.slstm.fused import CHECKPOINT_STEPS
from xlstm_lm.ops.slstm.shares import Kept

BLOCK = 128
"""Units of one row and head that a program has."""


@triton.jit
def advance(i, f, z, c, n, m):
    """c, n, m after a step, its input and forget weight, and tanh(z), from pre-activations of the gates."""
    decayed = log_sigmoid(f) + m
    m = tl.maximum(i, decayed)
    taken = tl.exp(i - m)
    kept = tl.exp(decayed - m)
    squashed = 2.0 / (1.0 + tl.exp(-2.0 * z)) - 1.0
    return kept * c + taken * squashed, kept * n + taken, m, taken, kept, squashed


@triton.jit
def retreat(dy, dh, ds, output, share, squashed, h, closed):
    """Gradients of the gates i, f, z, o of a step and of h after it, and of h and s before it (see `shares`), from
    those of y, of h as later steps see it, and of s after it."""
    dh += dy * output
    news = share * (squashed - h)
    left = 1.0 - share
    di = dh * news * left + ds * share
    ds -= di
    dz = dh * share * (1.0 - squashed * squashed)
    do = dy * (h + news) * output * (1.0 - output)
    return di, ds * closed, dz, do, dh, dh * left, ds


@triton.jit
def _units(H, D: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, head, units and which of them exist; places in a (B, H, D) tensor."""
    pair = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return pair // H, pair % H, d, d < D, pair * D + d


@triton.jit
def _gates(ptr, strides, place, inside):
    """The four gates at a place of a (B, 4, H, D) tensor, in float32."""
    i = tl.load(ptr + place, inside, 0.0).to(tl.float32)
    f = tl.load(ptr + place + strides[1], inside, 0.0).to(tl.float32)
    z = tl.load(ptr + place + 2 * strides[1], inside, 0.0).to(tl.float32)
    o = tl.load(ptr + place + 3 * strides[1], inside, 0.0).to(tl.float32)
    return i, f, z, o


@triton.jit(do_not_specialize=["B"])
def forward_step_kernel(
    product_ptr,
    wx_ptr,
    bias_ptr,
    reset_ptr,
    y_ptr,
    carried_y_ptr,
    c_ptr,
    n_ptr,
    m_ptr,
    product_strides,
    wx_strides,
    y_strides,
    reset_stride,
    B,
    H,
    D: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, d, inside, unit = _units(H, D, BLOCK)
    c = tl.load(c_ptr + unit, inside, 0.0)
    n = tl.load(n_ptr + unit, inside, 1.0)
    m = tl.load(m_ptr + unit, inside, 0.0)
    place = row * product_strides[0] + head * product_strides[2] + d
    i, f, z, o = _gates(product_ptr, product_strides, place, inside)
    if HAS_RESETS:
        reset = tl.load(reset_ptr + row * reset_stride) != 0
        c = tl.where(reset, 0.0, c)
        n = tl.where(reset, 0.0, n)
        m = tl.where(reset, float("-inf"), m)
        i, f = tl.where(reset, 0.0, i), tl.where(reset, 0.0, f)
        z, o = tl.where(reset, 0.0, z), tl.where(reset, 0.0, o)
    wi, wf, wz, wo = _gates(wx_ptr, wx_strides, row * wx_strides[0] + head * wx_strides[2] + d, inside)
    bi, bf, bz, bo = _gates(bias_ptr, (0, H * D), head * D + d, inside)
    c, n, m, _, _, _ = advance(i + wi + bi, f + wf + bf, z + wz + bz, c, n, m)
    y = (c / (n * (1.0 + tl.exp(-(o + wo + bo))))).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_strides[0] + head * y_strides[1] + d, y, inside)
    tl.store(carried_y_ptr + (head * B + row) * D + d, y, inside)
    tl.store(c_ptr + unit, c, inside)
    tl.store(n_ptr + unit, n, inside)
    tl.store(m_ptr + unit, m, inside)


@triton.jit(do_not_specialize=["B"])
def backward_step_kernel(
    values_ptr,
    dgates_ptr,
    factor_ptr,
    dy_ptr,
    dh_ptr,
    ds_ptr,
    dh_after_ptr,
    ds_after_ptr,
    values_strides,
    dgates_strides,
    B,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row, head and block of units. `factor`: the part of dgates that reaches the step before."""
    row, head, d, inside, unit = _units(H, D, BLOCK)
    carried = (head * B + row) * D + d
    place = values_ptr + row * values_strides[0] + head * values_strides[2] + d
    output = tl.load(place, inside, 0.0)
    share = tl.load(place + values_strides[1], inside, 0.0)
    squashed = tl.load(place + 2 * values_strides[1], inside, 0.0)
    h = tl.load(place + 3 * values_strides[1], inside, 0.0)
    closed = tl.load(place + 4 * values_strides[1], inside, 0.0)
    dy = tl.load(place + 5 * values_strides[1], inside, 0.0) + tl.load(dy_ptr + carried, inside, 0.0)
    dh = tl.load(dh_ptr + unit, inside, 0.0)
    ds = tl.load(ds_ptr + unit, inside, 0.0)
    tl.store(ds_after_ptr + unit, ds, inside)
    di, df, dz, do, dh_after, dh, ds = retreat(dy, dh, ds, output, share, squashed, h, closed)
    tl.store(dh_after_ptr + unit, dh_after, inside)
    tl.store(dh_ptr + unit, dh, inside)
    tl.store(ds_ptr + unit, ds, inside)
    dgates_ptr += row * dgates_strides[0] + head * dgates_strides[2]
    factor_ptr += (head * B + row) * 4 * D
    gradients = (di, df, dz, do)
    for gate in tl.static_range(4):
        tl.store(dgates_ptr + gate * dgates_strides[1] + d, gradients[gate], inside)
        tl.store(factor_ptr + gate * D + d, tl.where(closed < 0.0, 0.0, gradients[gate]), inside)


@triton.jit(do_not_specialize=["B", "T"])
def rebuild_kernel(
    gates_ptr,
    dy_ptr,
    checkpoints_ptr,
    resets_ptr,
    values_ptr,
    ends_ptr,
    dy_strides,
    B,
    T,
    H,
    D: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (row and head, block of units, checkpoint); in memory, gates are H, B, T, 4, D, values H, B, T, 6, D."""
    row, head, d, inside, unit = _units(H, D, BLOCK)
    size = B.to(tl.int64) * H * D
    segment = tl.program_id(2)
    checkpoints_ptr += segment * 3 * size
    c = tl.load(checkpoints_ptr + unit, inside, 0.0)
    n = tl.load(checkpoints_ptr + size + unit, inside, 1.0)
    m = tl.load(checkpoints_ptr + 2 * size + unit, inside, 0.0)
    first = segment * STEPS
    line = (head * B + row) * T
    dy_ptr += row * dy_strides[0] + head * dy_strides[2]
    for t in range(first, tl.minimum(first + STEPS, T)):
        i, f, z, o = _gates(gates_ptr, (0, D), (line + t) * 4 * D + d, inside)
        h = tl.where(n == 0.0, 0.0, c / n)
        if HAS_RESETS:
            reset = tl.load(resets_ptr + row * T + t) != 0
            c = tl.where(reset, 0.0, c)
            n = tl.where(reset, 0.0, n)
            m = tl.where(reset, float("-inf"), m)
            h = tl.where(reset, 0.0, h)
        c, n, m, taken, kept, squashed = advance(i, f, z, c, n, m)
        share = taken / n
        closed = 1.0 / (1.0 + tl.exp(f))
        if HAS_RESETS:
            kept = tl.where(reset, 0.0, kept)
            share = tl.where(reset, 1.0, share)
            closed = tl.where(reset, -1.0, closed)
        place = values_ptr + (line + t) * 6 * D + d
        tl.store(place, 1.0 / (1.0 + tl.exp(-o)), inside)
        tl.store(place + D, share, inside)
        tl.store(place + 2 * D, squashed, inside)
        tl.store(place + 3 * D, h, inside)
        tl.store(place + 4 * D, closed, inside)
        tl.store(place + 5 * D, tl.load(dy_ptr + tl.cast(t, tl.int64) * dy_strides[1] + d, inside, 0.0), inside)
        if t == 0:
            tl.store(ends_ptr + 2 * size + unit, kept / n, inside)
    if first + STEPS >= T:
        tl.store(ends_ptr + unit, c, inside)
        tl.store(ends_ptr + size + unit, n, inside)


def forward_step(
    product_BGHD: Tensor,
    wx_BGHD: Tensor,
    bias_GHD: Tensor,
    reset_B: Tensor | None,
    y_BHD: Tensor,
    carried_y_HBD: Tensor,
    state: tuple[Tensor, ...],
) -> None:
    """Fill y, in both places, and advance c, n, m in place."""
    B, _, H, D = wx_BGHD.shape
    forward_step_kernel[(B * H, triton.cdiv(D, BLOCK))](
        product_BGHD,
        wx_BGHD,
        bias_GHD,
        product_BGHD if reset_B is None else reset_B,
        y_BHD,
        carried_y_HBD,
        *state,
        product_BGHD.stride(),
        wx_BGHD.stride(),
        y_BHD.stride(),
        1 if reset_B is None else reset_B.stride(0),
        B,
        H,
        D,
        HAS_RESETS=reset_B is not None,
        BLOCK=BLOCK,
    )


def backward_step(values_BVHD: Tensor, dgates_BGHD: Tensor, factor_HBGD: Tensor, dstate: tuple[Tensor, ...]) -> None:
    """Fill dgates and the part of them that reaches the step before, and update the gradients of h and s in place."""
    B, _, H, D = values_BVHD.shape
    backward_step_kernel[(B * H, triton.cdiv(D, BLOCK))](
        values_BVHD,
        dgates_BGHD,
        factor_HBGD,
        *dstate,
        values_BVHD.stride(),
        dgates_BGHD.stride(),
        B,
        H,
        D,
        BLOCK=BLOCK,
    )


def rebuild(gates_BTGHD: Tensor, dy_BTHD: Tensor, checkpoints_NSBHD: Tensor, resets_BT: Tensor | None) -> Kept:
    """Run the cell again from every checkpoint at once. The gates include the recurrent products."""
    B, T, _, H, D = gates_BTGHD.shape
    values_HBTVD = gates_BTGHD.new_empty(H, B, T, 6, D)
    ends_SBHD = gates_BTGHD.new_empty(3, B, H, D)
    rebuild_kernel[(B * H, triton.cdiv(D, BLOCK), len(checkpoints_NSBHD))](
        gates_BTGHD,
        dy_BTHD,
        checkpoints_NSBHD,
        gates_BTGHD if resets_BT is None else resets_BT,
        values_HBTVD,
        ends_SBHD,
        dy_BTHD.stride(),
        B,
        T,
        H,
        D,
        HAS_RESETS=resets_BT is not None,
        STEPS=CHECKPOINT_STEPS,
        BLOCK=BLOCK,
    )
    return Kept(values_HBTVD.permute(1, 2, 3, 0, 4), ends_SBHD)
