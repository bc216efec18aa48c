"""The mLSTM in Triton kernels as two operators of PyTorch, forward and exact backward.

Their namespace is not that of our C++ operators, which have such names too.
As operators of the dispatcher they stay whole under torch.compile and in activation checkpointing. The forward keeps
L + 5 numbers a step and head (the scores in a chunk of L steps, c, x, m, x_divided, d); the states at the borders
between super-chunks are rebuilt in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlstm_lm.ops.assembler import check_machine_code
from xlstm_lm.ops.gpu import architecture
from xlstm_lm.ops.mlstm.recurrence import State, unit_stabilizer
from xlstm_lm.ops.mlstm.triton_gates import LOG2E, Gates, count_resets, gate_gradients, make_gates
from xlstm_lm.ops.mlstm.triton_launch import SHORTEST, launches, make_plan, why_not
from xlstm_lm.ops.mlstm.triton_scores import dscores, dscores_kernel, scores, scores_kernel
from xlstm_lm.ops.mlstm.triton_states import border_normalizers, border_states, contributions_kernel
from xlstm_lm.ops.mlstm.triton_walk import walk, walk_kernel


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
    super_chunk: int | None = None,
) -> tuple[Tensor, State | None]:
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there) on a GPU.

    q, k and v are multiplied in their own type with float32 sums; gates and states are float32. `chunk_length` is the
    chunkwise backend's. `super_chunk` is the least number of chunks that run one after another; None picks one, and a
    check picks few, so that a few steps make several super-chunks. Not twice differentiable.

    Raises:
        ValueError: `triton_launch.why_not` names a reason.
    """
    del chunk_length
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BTHK.dtype), v_BTHV.dtype)
    problem = why_not(q_BTHK.shape[-1], v_BTHV.shape[-1], dtype, q_BTHK.device)
    if problem is not None:
        raise ValueError(f"The triton backend {problem}: use 'chunkwise'.")
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
        SHORTEST if super_chunk is None else super_chunk,
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
    shortest: int = SHORTEST,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the last C, n and m (empty unless `return_state`), and c, x, m, x_divided, d and scores for the backward."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        B, T, H, K = q.shape
        chosen = launches(K, v.shape[-1], q.dtype, architecture(q.device))
        plan = make_plan(chosen, B, T, H, K, v.shape[-1], q.device, shortest)
        gates = make_gates(i, f, count_resets(resets), m, plan.L, sigmoid=sigmoid)
        normalizers = border_normalizers(k, gates, n, plan.L)
        weights, x_divided, d = scores(q, k, normalizers, gates, plan, normalize=normalize, eps=eps)
        states = border_states(k, v, gates, C, plan, chosen.states, x_query_BHT=x_divided, to_the_end=return_state)
        h, _ = walk(q, k, v, v, weights, states, gates, x_divided, plan, chosen.forward, transposed=False)
        check_machine_code((scores_kernel, contributions_kernel, walk_kernel), q.device)
        last = (states[:, :, -1].clone(), normalizers[:, :, -1].clone(), gates.m_BHT1[..., -1] / LOG2E.value)
        if not return_state:
            last = tuple(d.new_empty(0) for _ in range(3))
        return h, *last, gates.c_BHT, gates.x_BHT, gates.m_BHT1, x_divided, d, weights


forward = torch.library.custom_op("xlstm_lm_triton::mlstm_forward", launch_forward, mutates_args=())


@forward.register_fake
def _(q, k, v, i, f, resets, C, n, m, return_state, sigmoid, normalize, eps, shortest=SHORTEST):
    B, T, H, K = q.shape
    L = launches(K, v.shape[-1], q.dtype, architecture(q.device)).L
    shapes = ((B, H, K, v.shape[-1]), (B, H, K), (B, H)) if return_state else ((0,),) * 3
    shapes = (*shapes, (B, H, T), (B, H, T), (B, H, T + 1), (B, H, T), (B, H, T))
    kept = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return torch.empty_like(v), *kept, q.new_empty(B, H, -(-T // L), L, L)


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
    x_divided: Tensor,
    d: Tensor,
    weights: Tensor,
    dh: Tensor,
    dC_last: Tensor | None,
    dn_last: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    shortest: int = SHORTEST,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f and of the state before the first step, C and n (empty if there was none)."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        B, T, H, K = q.shape
        V = v.shape[-1]
        chosen = launches(K, V, q.dtype, architecture(q.device))
        plan = make_plan(chosen, B, T, H, K, V, q.device, shortest)
        gates = Gates(c, x, m, count_resets(resets))
        has_first, has_last = C is not None, dC_last is not None
        dweights, delta, q_dq = dscores(h, dh, v, gates, x_divided, d, plan, normalize=normalize, eps=eps)
        n_all = border_normalizers(k, gates, n, plan.L)
        dn_all = border_normalizers(q, gates, dn_last, plan.L, x_query_BHT=x_divided, delta_BHT=delta, reverse=True)
        borders = {"x_query_BHT": x_divided, "plan": plan, "launch": chosen.states}
        states = border_states(k, v, gates, C, **borders, to_the_end=has_last)
        dstates = border_states(q, dh, gates, dC_last, **borders, reverse=True, to_the_end=has_first)
        shared = {"gates": gates, "x_divided_BHT": x_divided, "plan": plan}
        dq, _ = walk(
            dh, v, k, q, dweights, states, **shared, launch=chosen.dq, transposed=True, n_BHNW=n_all, delta_BHT=delta
        )
        dk, k_dk = walk(
            v, dh, q, k, dweights, dstates, **shared, launch=chosen.dk, transposed=True, reverse=True, n_BHNW=dn_all,
            other_BTHW=k,
        )  # fmt: skip
        dv, _ = walk(k, q, dh, v, weights, dstates, **shared, launch=chosen.dv, transposed=False, reverse=True)
        check_machine_code((dscores_kernel, contributions_kernel, walk_kernel), q.device)
        products = None
        if plan.supers(T) > 1 or has_last:
            at = torch.arange(plan.supers(T) + 1, device=q.device).mul(plan.chunks).clamp(max=n_all.shape[2] - 1)
            products = torch.linalg.vecdot(states.flatten(3), dstates.flatten(3))
            products += torch.linalg.vecdot(n_all[:, :, at], dn_all[:, :, at])
            if not has_last:
                products[..., -1] = 0.0
        di, df = gate_gradients(i, f, gates, q_dq, k_dk, products, plan.steps, sigmoid=sigmoid)
        if has_first:
            return dq, dk, dv, di, df, dstates[:, :, 0].clone(), dn_all[:, :, 0].clone()
        return dq, dk, dv, di, df, d.new_empty(0), d.new_empty(0)


backward = torch.library.custom_op("xlstm_lm_triton::mlstm_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    q,
    k,
    v,
    i,
    f,
    resets,
    C,
    n,
    h,
    c,
    x,
    m,
    x_divided,
    d,
    weights,
    dh,
    dC_last,
    dn_last,
    sigmoid,
    normalize,
    eps,
    shortest=SHORTEST,
):
    dstate = (C.new_empty(C.shape), n.new_empty(n.shape)) if C is not None else (d.new_empty(0), d.new_empty(0))
    return *(torch.empty_like(each) for each in (q, k, v)), *(x.new_empty(x.shape) for x in (i, f)), *dstate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, i, f, resets, C, n, _, _, *options = inputs
    h, _, _, m, *kept = output
    ctx.save_for_backward(q, k, v, i, f, resets, C, n, h, *kept)
    ctx.options = options
    ctx.mark_non_differentiable(m, *kept)
    ctx.set_materialize_grads(False)  # else there would be zeros for all of them


def _backward_of_forward(
    ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # to be asked for once in activation checkpointing
    q, _, v, *_, C_first, _, h = saved[:9]
    if dh is None:
        dh = torch.zeros_like(h)
    if dC is not None or dn is not None:
        B, _, H, K = q.shape
        dC = q.new_zeros(B, H, K, v.shape[-1], dtype=torch.float32) if dC is None else dC
        dn = q.new_zeros(B, H, K, dtype=torch.float32) if dn is None else dn
    with torch.autocast(dh.device.type, enabled=False):  # the little that PyTorch computes in it stays float32
        *gradients, dC_first, dn_first = backward(*saved, dh, dC, dn, *ctx.options)
    dstate = (None, None) if C_first is None else (dC_first, dn_first)
    return (*gradients, None, *dstate, *(None,) * 6)


forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
