"""The mLSTM's decode step in Triton: one launch, which reads and writes the state once.

A program has all K rows of the state of one head, for a block of its V columns. Therefore h = C^T q needs no sum over
programs and no second launch, and C can be overwritten in place: no other program reads that block. Every program of a
head reads all of n and m, and programs have no order: one that wrote the new n and m over the old ones could do so
before another has read them. Therefore n and m, K + 1 numbers a head beside the K x V of C, are written to new tensors,
by the program of the first columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.gpu import padded
from xlstm_lm.ops.mlstm.recurrence import DEFAULTS, Options, State
from xlstm_lm.ops.mlstm.triton_gates import SMALLEST, log_sigmoid
from xlstm_lm.ops.mlstm.triton_launch import why_not_step

BLOCK_K, BLOCK_V = 256, 32
"""Rows and columns of the state that a program has at a time, at most: columns that fill the lines of the cache."""


def mlstm_triton_step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    i_B1H: Tensor,
    f_B1H: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = True,
    options: Options = DEFAULTS,
    overwrite_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The same as `xlstm_lm.ops.mlstm.step.mlstm_step` on a GPU, computed in float32.

    Raises:
        ValueError: more than one token, or `triton_launch.why_not_step` names a reason.
    """
    if q_B1HK.shape[1] != 1:
        raise ValueError(f"The triton_step backend takes one token, T = 1, got T = {q_B1HK.shape[1]}: use 'triton'.")
    for x in (q_B1HK, k_B1HK, v_B1HV):
        problem = why_not_step(x.dtype, x.device)
        if problem is not None:
            raise ValueError(f"The triton_step backend {problem}: use 'step'.")
    with torch.no_grad():
        inputs = [x.detach() for x in (q_B1HK, k_B1HK, v_B1HV, i_B1H, f_B1H)]
        C_BHKV = n_BHK = m_BH = None
        if initial_state is not None:
            C_BHKV, n_BHK, m_BH = (x.detach().float().contiguous() for x in initial_state)
        others = (options.input_gate == "sigmoid", options.normalize, options.eps)
        if overwrite_state and C_BHKV is not None:
            h_B1HV, n_BHK, m_BH = step_in_place(*inputs, resets_BT, C_BHKV, n_BHK, m_BH, *others)
        else:
            h_B1HV, C_BHKV, n_BHK, m_BH = step(*inputs, resets_BT, C_BHKV, n_BHK, m_BH, *others)
    return h_B1HV, (C_BHKV, n_BHK, m_BH) if return_state else None


@triton.jit(do_not_specialize=["H", "has_state", "eps", "scale"])
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    i_ptr,
    f_ptr,
    resets_ptr,
    C_ptr,
    n_ptr,
    m_ptr,
    h_ptr,
    C_next_ptr,
    n_next_ptr,
    m_next_ptr,
    q_strides,
    k_strides,
    v_strides,
    i_strides,
    f_strides,
    resets_stride,
    H,
    has_state,
    eps,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """One block of columns of the state after the step and of h. C_next may be C itself."""
    blocks = tl.cdiv(V, BLOCK_V)
    program = tl.program_id(0).to(tl.int64)
    block, pair = (program % blocks).to(tl.int32), program // blocks
    row, head = pair // H, pair % H
    value = block * BLOCK_V + tl.arange(0, BLOCK_V)
    q_ptr += row * q_strides[0] + head * q_strides[2]
    k_ptr += row * k_strides[0] + head * k_strides[2]
    v_ptr += row * v_strides[0] + head * v_strides[2]
    C_ptr += pair * K * V
    C_next_ptr += pair * K * V

    log_input = tl.load(i_ptr + row * i_strides[0] + head * i_strides[2]).to(tl.float32)
    log_forget = log_sigmoid(tl.load(f_ptr + row * f_strides[0] + head * f_strides[2]).to(tl.float32))
    there = has_state != 0
    if HAS_RESETS:
        there = there & (tl.load(resets_ptr + row * resets_stride).to(tl.int32) == 0)
    exponent = tl.load(m_ptr + pair, there, float("-inf")) + log_forget
    if SIGMOID:
        log_input = log_sigmoid(log_input)
        m = tl.full([], 0.0, tl.float32)
    else:
        m = tl.maximum(tl.maximum(exponent, log_input), SMALLEST)
    kept = tl.exp(exponent - m)
    added = tl.exp(log_input - m)

    v = tl.load(v_ptr + value * v_strides[3], value < V, 0.0).to(tl.float32)
    num = tl.zeros([BLOCK_V], tl.float32)
    d = 0.0
    for first in tl.static_range(0, K, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        q = tl.load(q_ptr + key * q_strides[3], key < K, 0.0).to(tl.float32)
        k = tl.load(k_ptr + key * k_strides[3], key < K, 0.0).to(tl.float32) * added
        inside = (key < K)[:, None] & (value < V)[None, :]
        entry = key[:, None] * V + value[None, :]
        C = k[:, None] * v[None, :]
        n = k
        if there:
            C += tl.load(C_ptr + entry, inside, 0.0) * kept
            n += tl.load(n_ptr + pair * K + key, key < K, 0.0) * kept
        tl.store(C_next_ptr + entry, C, inside)
        num += tl.sum(q[:, None] * C, 0)
        d += tl.sum(q * n, 0)
        if block == 0:
            tl.store(n_next_ptr + pair * K + key, n, key < K)
    if block == 0:
        tl.store(m_next_ptr + pair, m)
    if NORMALIZE:
        h = num * (scale / (tl.maximum(tl.abs(d * scale), tl.exp(-m)) + eps))
    else:
        h = num * (scale * tl.exp(m))
    tl.store(h_ptr + pair * V + value, h.to(h_ptr.dtype.element_ty), value < V)


def launch_step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    i_B1H: Tensor,
    f_B1H: Tensor,
    resets_B1: Tensor | None,
    C_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    C_next_BHKV: Tensor,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """h and the next n and m; the next C is written into `C_next_BHKV`. C, n and m are contiguous, and None for an
    empty state."""
    B, _, H, K = q_B1HK.shape
    V = v_B1HV.shape[-1]
    h_B1HV = v_B1HV.new_empty(v_B1HV.shape)
    n_next_BHK, m_next_BH = C_next_BHKV.new_empty(B, H, K), C_next_BHKV.new_empty(B, H)
    has_state = C_BHKV is not None
    block_k, block_v = min(padded(K), BLOCK_K), min(padded(V), BLOCK_V)
    with torch.cuda.device_of(q_B1HK):  # Triton launches on the current device
        step_kernel[(B * H * triton.cdiv(V, block_v),)](
            q_B1HK,
            k_B1HK,
            v_B1HV,
            i_B1H,
            f_B1H,
            i_B1H if resets_B1 is None else resets_B1,
            C_BHKV if has_state else C_next_BHKV,
            n_BHK if has_state else n_next_BHK,
            m_BH if has_state else m_next_BH,
            h_B1HV,
            C_next_BHKV,
            n_next_BHK,
            m_next_BH,
            q_B1HK.stride(),
            k_B1HK.stride(),
            v_B1HV.stride(),
            i_B1H.stride(),
            f_B1H.stride(),
            0 if resets_B1 is None else resets_B1.stride(0),
            H,
            int(has_state),
            eps,
            K**-0.5,
            K=K,
            V=V,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            SIGMOID=sigmoid,
            NORMALIZE=normalize,
            HAS_RESETS=resets_B1 is not None,
            num_warps=8 if block_k * block_v > 4096 else 4,
        )
    return h_B1HV, n_next_BHK, m_next_BH


@torch.library.custom_op("xlstm_lm_triton::mlstm_step", mutates_args=())
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and the next C, n and m, all new."""
    B, _, H, K = q.shape
    C_next = q.new_empty(B, H, K, v.shape[-1], dtype=torch.float32)
    h, n_next, m_next = launch_step(q, k, v, i, f, resets, C, n, m, C_next, sigmoid, normalize, eps)
    return h, C_next, n_next, m_next


@step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, _, H, K = q.shape
    state = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, K, v.shape[-1]), (B, H, K), (B, H)))
    return v.new_empty(v.shape), *state


@torch.library.custom_op("xlstm_lm_triton::mlstm_step_in_place", mutates_args=("C",))
def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """h and the next n and m; C is overwritten with the next one."""
    return launch_step(q, k, v, i, f, resets, C, n, m, C, sigmoid, normalize, eps)


@step_in_place.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return v.new_empty(v.shape), n.new_empty(n.shape), m.new_empty(m.shape)
