"""The mLSTM as a compiled CPU kernel, which reads each tensor in place."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import needs_gradient
from xlstm_lm.ops.mlstm.recurrence import DEFAULTS, Options, State, unit_stabilizer
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
    options: Options = DEFAULTS,
) -> tuple[Tensor, State | None]:
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there) for CPU tensors.

    Half precisions are computed in float32. Between the passes the inputs, h, two numbers a step and the state every
    four chunks are kept; a chunk has `default_chunk_length` steps unless the options say otherwise. Differentiable
    once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    chunk_length, input_gate, normalize, eps = options
    if initial_state is not None and input_gate == "sigmoid":
        initial_state = unit_stabilizer(initial_state)
    if chunk_length is None:
        chunk_length = default_chunk_length(q_BTHK.shape[-1], v_BTHV.shape[-1])
    C_BHKV, n_BHK, m_BH = (None, None, None) if initial_state is None else initial_state
    inputs = (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
    h_BTHV, C_BHKV, n_BHK, m_BH, *_ = torch.ops.xlstm_lm.mlstm_forward(
        *inputs,
        resets_BT,
        C_BHKV,
        n_BHK,
        None if m_BH is None else m_BH.detach(),
        return_state,
        needs_gradient(*inputs, C_BHKV, n_BHK),
        input_gate == "sigmoid",
        normalize,
        eps,
        chunk_length,
    )
    return h_BTHV, (C_BHKV, n_BHK, m_BH) if return_state else None


def default_chunk_length(K: int, V: int) -> int:
    """The chunk length that was fastest: longer only where the K x V state has outgrown the nearer caches."""
    return 32 if K * V <= 64 * 128 else 64
