"""The mLSTM as a compiled CPU kernel, given to autograd: each tensor is read where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_lm.ops.mlstm.block import Options
from xlstm_lm.ops.mlstm.recurrence import State, gate_dtype, unit_stabilizer
from xlstm_lm.ops.native import load_kernels


def mlstm_compiled(
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
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there) for CPU tensors.

    Half precisions run in float32. Between the passes it keeps the inputs, h, two numbers a step and the state before
    every fourth chunk of `chunk_length` steps (None takes `default_chunk_length`). Not twice differentiable.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    if initial_state is not None and input_gate == "sigmoid":
        initial_state = unit_stabilizer(initial_state)
    if chunk_length is None:
        chunk_length = default_chunk_length(q_BTHK.shape[-1], v_BTHV.shape[-1])
    options = Options(chunk_length, input_gate, normalize, eps, return_state)
    state = (None, None, None) if initial_state is None else initial_state
    h_BTHV, *last = _Compiled.apply(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, *state, resets_BT, options)
    return h_BTHV, tuple(last) if return_state else None


def default_chunk_length(K: int, V: int) -> int:
    """The chunk length that was fastest: longer only where the K x V state has outgrown the nearer caches."""
    return 32 if K * V <= 64 * 128 else 64


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        i_BTH: Tensor,
        f_BTH: Tensor,
        C_BHKV: Tensor | None,
        n_BHK: Tensor | None,
        m_BH: Tensor | None,
        resets_BT: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        inputs = (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
        dtype = gate_dtype(q_BTHK)
        state = [] if C_BHKV is None else [x.to(dtype).contiguous() for x in (C_BHKV, n_BHK, m_BH)]
        h_BTHV, *last, d_BHT, m_of_chunks, states = torch.ops.xlstm_lm.mlstm_forward(
            *_readable(inputs, dtype),
            None if resets_BT is None else resets_BT.contiguous(),
            state,
            options.return_state,
            any(ctx.needs_input_grad),
            *_kernel_options(options),
        )
        h_BTHV = h_BTHV.to(v_BTHV.dtype)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.has_state = C_BHKV is not None
        ctx.save_for_backward(*inputs, resets_BT, h_BTHV, d_BHT, m_of_chunks, states, *last[:2])
        if not options.return_state:
            return h_BTHV, None, None, None
        ctx.mark_non_differentiable(last[2])
        return h_BTHV, *last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dh_BTHV: Tensor | None, dC_BHKV: Tensor | None, dn_BHK: Tensor | None, _dm: None
    ) -> tuple[Tensor | None, ...]:
        *inputs, resets_BT, h_BTHV, d_BHT, m_of_chunks, states, C_BHKV, n_BHK = ctx.saved_tensors
        dtype = gate_dtype(inputs[0])
        if dh_BTHV is None:
            dh_BTHV = torch.zeros_like(h_BTHV)
        last, dlast = [], []
        if dC_BHKV is not None or dn_BHK is not None:
            last = [C_BHKV, n_BHK]
            dlast = [
                torch.zeros_like(x) if dx is None else dx.contiguous()
                for x, dx in zip(last, (dC_BHKV, dn_BHK), strict=True)
            ]
        *gradients, dC_BHKV, dn_BHK = torch.ops.xlstm_lm.mlstm_backward(
            *_readable(inputs, dtype),
            None if resets_BT is None else resets_BT.contiguous(),
            *_readable((h_BTHV, dh_BTHV), dtype),
            [d_BHT, m_of_chunks, states],
            last,
            dlast,
            ctx.has_state,
            *_kernel_options(ctx.options),
        )
        gradients = [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]
        dstate = (dC_BHKV, dn_BHK) if ctx.has_state else (None, None)
        return *gradients, *dstate, None, None, None


def _readable(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The tensors as the kernel reads them: any strides, but a contiguous last dimension where they have four."""
    tensors = [x.to(dtype) for x in tensors]
    return [x.contiguous() if x.dim() == 4 and x.stride(-1) != 1 else x for x in tensors]


def _kernel_options(options: Options) -> tuple[bool, bool, float, int]:
    """What the kernel is told about how to compute."""
    return options.input_gate == "sigmoid", options.normalize, options.eps, options.chunk_length
