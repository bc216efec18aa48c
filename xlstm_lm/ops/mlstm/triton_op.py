"""The mLSTM in Triton kernels as two operators of PyTorch, forward and exact backward.

Their namespace is not that of our C++ operators, which have such names too.
As operators of the dispatcher they stay whole under torch.compile and in activation checkpointing. The forward keeps
four numbers a step and head (c, x, m, d); the states at the borders between super-chunks are rebuilt in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from xlstm_lm.ops.mlstm.recurrence import State, unit_stabilizer
from xlstm_lm.ops.mlstm.triton_backward import Rows, walk_for_dk, walk_for_dq, walk_for_dv
from xlstm_lm.ops.mlstm.triton_forward import walk_forward
from xlstm_lm.ops.mlstm.triton_gates import LOG2E, Gates, gate_gradients, make_gates, row_terms
from xlstm_lm.ops.mlstm.triton_launch import architecture, launches, make_plan
from xlstm_lm.ops.mlstm.triton_states import border_states

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter stands in for a GPU, as TRITON_INTERPRET=1 makes it: slow, for tests."""


def mlstm_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    input_gate: str = "exp",
    normalize: bool = True,
    chunk_length: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State | None]:
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there) on a GPU.

    q, k and v are multiplied in their own type with float32 sums; gates and states are float32. `chunk_length` is the
    chunkwise backend's. Not twice differentiable.

    Raises: ValueError for a type other than float32, bfloat16 and float16, or a device without Triton.
    """
    del chunk_length
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BTHK.dtype), v_BTHV.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"The triton backend takes float32, bfloat16 or float16, got {dtype}: use 'chunkwise'.")
    if q_BTHK.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"The triton backend takes tensors of a GPU, got {q_BTHK.device}: use 'chunkwise'.")
    C_BHKV = n_BHK = m_BH = None
    if initial_state is not None:
        state = unit_stabilizer(initial_state) if input_gate == "sigmoid" else initial_state
        C_BHKV, n_BHK, m_BH = (x.float() for x in state)
    h_BTHV, C, n, m, *_ = forward(
        q_BTHK.to(dtype),
        k_BTHK.to(dtype),
        v_BTHV.to(dtype),
        i_BTH,
        f_BTH,
        resets_BT,
        C_BHKV,
        n_BHK,
        None if m_BH is None else m_BH.detach(),
        return_state,
        input_gate == "sigmoid",
        normalize,
        eps,
    )
    return h_BTHV.to(v_BTHV.dtype), (C, n, m.detach()) if return_state else None


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_state: bool,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the last C, n and m (empty unless `return_state`), and c, x, m, d for the backward."""
    B, T, H, K = q.shape
    chosen = launches(K, v.shape[-1], q.dtype, architecture(q.device))
    plan = make_plan(chosen, B, T, H, q.device)
    gates = make_gates(i, f, resets, m, plan.L, sigmoid=sigmoid)
    borders = border_states(k, v, gates, None if C is None else (C, n), plan, chosen.states, to_the_end=return_state)
    h, d = walk_forward(
        q, k, v, gates, borders, plan, chosen.forward, has_state=C is not None, normalize=normalize, eps=eps
    )
    last = (borders.C_BHSKV[:, :, -1].clone(), borders.n_BHSK[:, :, -1].clone(), gates.m_BHT1[..., -1] / LOG2E.value)
    if not return_state:
        last = tuple(d.new_empty(0) for _ in range(3))
    return h, *last, gates.c_BHT, gates.x_BHT, gates.m_BHT1, d


forward = torch.library.custom_op("xlstm_lm_triton::mlstm_forward", launch_forward, mutates_args=())


@forward.register_fake
def _(q, k, v, i, f, resets, C, n, m, return_state, sigmoid, normalize, eps):
    B, T, H, K = q.shape
    shapes = ((B, H, K, v.shape[-1]), (B, H, K), (B, H)) if return_state else ((0,),) * 3
    shapes = (*shapes, (B, H, T), (B, H, T), (B, H, T + 1), (B, H, T))
    return torch.empty_like(v), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor | None,
    n: Tensor | None,
    h: Tensor,
    c: Tensor,
    x: Tensor,
    m: Tensor,
    d: Tensor,
    dh: Tensor,
    dC_last: Tensor | None,
    dn_last: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f and of the state before the first step, C and n (empty if there was none)."""
    B, T, H, K = q.shape
    chosen = launches(K, v.shape[-1], q.dtype, architecture(q.device))
    plan = make_plan(chosen, B, T, H, q.device)
    segment = None if resets is None else torch.nn.functional.pad(resets.cumsum(1, dtype=torch.int32), (1, 0))
    gates = Gates(c, x, m, segment)
    has_first, has_last = C is not None, dC_last is not None
    x_divided, delta, q_dq = row_terms(h, dh, d, gates, K=K, normalize=normalize, eps=eps)
    rows = Rows(x_divided, delta)
    states = border_states(k, v, gates, (C, n) if has_first else None, plan, chosen.states, to_the_end=has_last)
    dstates = border_states(
        q,
        dh,
        gates,
        (dC_last, dn_last) if has_last else None,
        plan,
        chosen.states,
        x_query_BHT=x_divided,
        delta_BHT=delta,
        reverse=True,
        to_the_end=has_first,
    )
    dq = walk_for_dq((q, k, v), dh, gates, rows, states, plan, chosen.dq, has_state=has_first)
    dk, k_dk = walk_for_dk((q, k, v), dh, gates, rows, dstates, plan, chosen.dk, has_state=has_last)
    dv = walk_for_dv((q, k, v), dh, gates, rows, dstates, plan, chosen.dv, has_state=has_last)
    products = None
    if plan.supers(T) > 1 or has_last:
        products = sum(torch.linalg.vecdot(a.flatten(3), b.flatten(3)) for a, b in zip(states, dstates))
        if not has_last:
            products[..., -1] = 0.0
    di, df = gate_gradients(i, f, gates, q_dq, k_dk, products, plan.steps, sigmoid=sigmoid)
    if has_first:
        return dq, dk, dv, di, df, dstates.C_BHSKV[:, :, 0].clone(), dstates.n_BHSK[:, :, 0].clone()
    return dq, dk, dv, di, df, d.new_empty(0), d.new_empty(0)


backward = torch.library.custom_op("xlstm_lm_triton::mlstm_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(q, k, v, i, f, resets, C, n, h, c, x, m, d, dh, dC_last, dn_last, sigmoid, normalize, eps):
    dstate = (torch.empty_like(C), torch.empty_like(n)) if C is not None else (d.new_empty(0), d.new_empty(0))
    return *(torch.empty_like(each) for each in (q, k, v, i, f)), *dstate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, i, f, resets, C, n, _m, return_state, sigmoid, normalize, eps = inputs
    h, _C, _n, _m, *kept = output
    ctx.save_for_backward(q, k, v, i, f, resets, C, n, h, *kept)
    ctx.options = (sigmoid, normalize, eps)
    ctx.return_state = return_state


def _backward_of_forward(ctx: Any, dh: Tensor, dC: Tensor, dn: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dlast = (dC, dn) if ctx.return_state else (None, None)
    saved = ctx.saved_tensors  # to be asked for once in activation checkpointing
    *gradients, dC_first, dn_first = backward(*saved, dh, *dlast, *ctx.options)
    has_first = saved[6] is not None
    return *gradients, None, *((dC_first, dn_first) if has_first else (None, None)), *(None,) * 5


forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
