"""The mLSTM in batched matrix products over chunks of the sequence, with its exact backward written by hand.

A row is cut into chunks of L steps. Inside a chunk every step sees every earlier one through an L x L matrix, as in
attention; older steps contribute through the state before the chunk, and the states before all chunks of a block come
from one product with an N x N matrix of decays. Blocks of N chunks follow each other, so memory and time are linear
in T. The remaining steps are a last block of a single, shorter chunk: T may have any value.

The backward rebuilds all of this block by block, last block first, from the inputs, the output, the state before each
block and one number a step, the normalizer d. Both passes are operators of PyTorch. (arXiv 2405.04517, eq. 19-27; the
chunkwise form: arXiv 2503.14376; the backward is derived from it.)

Products are made in float32 (float64 for float64 inputs) whatever the type of q, k, v: 16-bit inputs lose nothing
more here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_lm.ops.compiling import custom_operator, needs_gradient, without_autocast
from xlstm_lm.ops.mlstm.block import backward_block, forward_block
from xlstm_lm.ops.mlstm.gates import BlockGates, block_gates
from xlstm_lm.ops.mlstm.recurrence import DEFAULTS, Options, State, empty_state, gate_dtype, unit_stabilizer

BLOCK_CHUNKS = 16
"""Chunks a block: the decays between them cost N * K * V a chunk, the loop over blocks costs little."""


class Block(NamedTuple):
    """`chunks` chunks of `length` steps each, from step `start`."""

    start: int
    chunks: int
    length: int

    @property
    def steps(self) -> slice:
        """The block's steps in the sequence."""
        return slice(self.start, self.start + self.chunks * self.length)

    def cut(self, x_BTX: Tensor) -> Tensor:
        """The block's part (B, N, L, ...) of a whole sequence."""
        return x_BTX[:, self.steps].unflatten(1, (self.chunks, self.length))

    def of_heads(self, x_HBT: Tensor) -> Tensor:
        """The block's part (H, B, N, L) of numbers for each head of a whole sequence: a view."""
        return x_HBT[:, :, self.steps].unflatten(2, (self.chunks, self.length))


def mlstm_chunkwise(
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
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there), chunk by chunk.

    A chunk has `default_chunk_length` steps unless the options say otherwise. Not twice differentiable.
    """
    chunk_length, input_gate, normalize, eps = options
    if initial_state is not None and input_gate == "sigmoid":
        initial_state = unit_stabilizer(initial_state)
    if chunk_length is None:
        chunk_length = default_chunk_length(q_BTHK.shape[-1], v_BTHV.shape[-1])
    C_BHKV, n_BHK, m_BH = (None, None, None) if initial_state is None else initial_state
    inputs = (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
    save = needs_gradient(*inputs, C_BHKV, n_BHK)
    m_BH = None if m_BH is None else m_BH.detach()
    h_BTHV, C_BHKV, n_BHK, m_BH, *_ = forward(
        *inputs, resets_BT, C_BHKV, n_BHK, m_BH, save, chunk_length, input_gate, normalize, eps, return_state
    )
    return h_BTHV, (C_BHKV, n_BHK, m_BH) if return_state else None


def default_chunk_length(K: int, V: int) -> int:
    """The chunk length that was fastest: the L x L tiles and the K x V states should cost about the same."""
    return 64 if max(K, V) <= 256 else 128


def compute_forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    save: bool,
    chunk_length: int,
    input_gate: str,
    normalize: bool,
    eps: float,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h; C, n, m after the last step, empty unless `return_state`; and, empty unless `save`, d of each step (H, B, T)
    and C, n, m before each block but the first, heads before rows."""
    options = Options(chunk_length, input_gate, normalize, eps)
    B, T, H, _ = q_BTHK.shape
    shapes = (q_BTHK, v_BTHV, save, chunk_length, return_state)
    dtype = gate_dtype(q_BTHK)
    h_BTHV, C_last, n_last, m_last, d_HBT, C_MHBKV, n_MHBK, m_MHB = _forward_shapes(*shapes)
    if not save:
        d_HBT = q_BTHK.new_empty(H, B, T, dtype=dtype)
    state = _first_state(q_BTHK, v_BTHV, C_BHKV, n_BHK, m_BH, input_gate)
    blocks = _blocks(T, chunk_length)
    with without_autocast(q_BTHK):
        log_gates = _log_gates(i_BTH, f_BTH, resets_BT, options, dtype)
        for index, block in enumerate(blocks):
            if save and index > 0:
                for kept, x in zip((C_MHBKV, n_MHBK, m_MHB), state, strict=True):
                    kept[index - 1].copy_(x)
            state = forward_block(
                (q_BTHK[:, block.steps], k_BTHK[:, block.steps], v_BTHV[:, block.steps]),
                _block_gates(block, log_gates, state[2], resets_BT, q_BTHK.shape[-1], options),
                state,
                h_BTHV[:, block.steps],
                block.of_heads(d_HBT),
                has_state=C_BHKV is not None or block.start > 0,
                needs_next=return_state or block is not blocks[-1],
                options=options,
            )
    if return_state:
        C_last, n_last, m_last = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in state)
    return h_BTHV, C_last, n_last, m_last, d_HBT if save else d_HBT.new_empty(0), C_MHBKV, n_MHBK, m_MHB


def _forward_shapes(
    q_BTHK: Tensor, v_BTHV: Tensor, save: bool, chunk_length: int, return_state: bool
) -> tuple[Tensor, ...]:
    B, T, H, K = q_BTHK.shape
    V, dtype = v_BTHV.shape[-1], gate_dtype(q_BTHK)
    whole, chunks = T // chunk_length, -(-T // chunk_length)
    M = -(-whole // BLOCK_CHUNKS) + chunks - whole - 1  # blocks but the first
    last = ((B, H, K, V), (B, H, K), (B, H)) if return_state else ((0,),) * 3
    kept = ((H, B, T), (M, H, B, K, V), (M, H, B, K), (M, H, B)) if save else ((0,),) * 4
    return v_BTHV.new_empty(v_BTHV.shape), *(q_BTHK.new_empty(shape, dtype=dtype) for shape in (*last, *kept))


def compute_backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    h_BTHV: Tensor,
    C_last_BHKV: Tensor | None,
    n_last_BHK: Tensor | None,
    d_HBT: Tensor,
    C_MHBKV: Tensor,
    n_MHBK: Tensor,
    m_MHB: Tensor,
    dh_BTHV: Tensor,
    dC_BHKV: Tensor | None,
    dn_BHK: Tensor | None,
    chunk_length: int,
    input_gate: str,
    normalize: bool,
    eps: float,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f, and of C and n before the first step, empty where there was no state.

    The last C and n and their gradients are None where no gradient reaches them.
    """
    options = Options(chunk_length, input_gate, normalize, eps)
    dtype = gate_dtype(q_BTHK)
    next_state: tuple[Tensor, Tensor] | None = None
    dstate: tuple[Tensor, Tensor] | None = None
    if dC_BHKV is not None:
        assert dn_BHK is not None and C_last_BHKV is not None and n_last_BHK is not None
        next_state = C_last_BHKV.transpose(0, 1), n_last_BHK.transpose(0, 1)
        dC_HBKV, dn_HBK = (dx.transpose(0, 1).to(dtype).contiguous() for dx in (dC_BHKV, dn_BHK))
        dstate = dC_HBKV, dn_HBK
    dq_BTHK, dk_BTHK, dv_BTHV = (x.new_empty(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV))
    di_BTH, df_BTH = (x.new_empty(x.shape, dtype=dtype) for x in (i_BTH, f_BTH))
    first = _first_state(q_BTHK, v_BTHV, C_BHKV, n_BHK, m_BH, input_gate)
    states = [first, *zip(C_MHBKV, n_MHBK, m_MHB, strict=True)]
    blocks = _blocks(q_BTHK.shape[1], chunk_length)
    with without_autocast(q_BTHK):
        log_gates = _log_gates(i_BTH, f_BTH, resets_BT, options, dtype)
        for block, state in zip(reversed(blocks), reversed(states), strict=True):
            q, k, v, h, dh, dq, dk, dv = (
                x[:, block.steps] for x in (q_BTHK, k_BTHK, v_BTHV, h_BTHV, dh_BTHV, dq_BTHK, dk_BTHK, dv_BTHV)
            )
            k_dk_HBNL, difference_HBNL, before = backward_block(
                (q, k, v),
                _block_gates(block, log_gates, state[2], resets_BT, q_BTHK.shape[-1], options),
                state,
                h,
                block.of_heads(d_HBT).contiguous(),
                dh,
                dstate,
                (dq, dk, dv),
                has_state=C_BHKV is not None or block.start > 0,
                options=options,
            )
            difference_HBT = difference_HBNL.flatten(2).flip(-1).cumsum(-1).flip(-1)
            if next_state is not None and dstate is not None:
                # All that follows the block acts on its gates through the state after it.
                C_dC_HB1, n_dn_HB1 = ((x * dx).flatten(2).sum(-1, keepdim=True) for x, dx in zip(next_state, dstate))
                difference_HBT += C_dC_HB1 + n_dn_HB1
            di_BTH[:, block.steps] = k_dk_HBNL.flatten(2).permute(1, 2, 0)
            df_BTH[:, block.steps] = difference_HBT.permute(1, 2, 0)
            dstate, next_state = before, state[:2]
        df_BTH *= torch.sigmoid(-f_BTH.to(dtype))
        if resets_BT is not None:
            df_BTH.masked_fill_(resets_BT[..., None], 0.0)
        if input_gate == "sigmoid":
            di_BTH *= torch.sigmoid(-i_BTH.to(dtype))
    dC_first, dn_first = (q_BTHK.new_empty(0, dtype=dtype) for _ in range(2))
    if dstate is not None:
        dC_first, dn_first = (x.transpose(0, 1).contiguous() for x in dstate)
    return dq_BTHK, dk_BTHK, dv_BTHV, di_BTH.to(i_BTH.dtype), df_BTH.to(f_BTH.dtype), dC_first, dn_first


def _backward_shapes(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    dtype = gate_dtype(q_BTHK)
    gradients = (x.new_empty(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH))
    dfirst = (q_BTHK.new_empty(0 if x is None else x.shape, dtype=dtype) for x in (C_BHKV, n_BHK))
    return *gradients, *dfirst


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, save = inputs[:10]
    ctx.options = inputs[10:]
    assert save, "a call that needs gradients has to keep what they need"
    h_BTHV, C_BHKV, n_BHK, _, *kept = output
    ctx.save_for_backward(*tensors, h_BTHV, C_BHKV, n_BHK, *kept)
    return_state = ctx.options[-1]
    ctx.mark_non_differentiable(*output[3 if return_state else 1 :])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dh_BTHV: Tensor | None, dC_BHKV: Tensor | None, dn_BHK: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *inputs, h_BTHV, C_BHKV, n_BHK, d_HBT, C_MHBKV, n_MHBK, m_MHB = ctx.saved_tensors
    if dh_BTHV is None:
        dh_BTHV = torch.zeros_like(h_BTHV)
    if dC_BHKV is None and dn_BHK is None:
        C_BHKV = n_BHK = None
    else:
        dC_BHKV = torch.zeros_like(C_BHKV) if dC_BHKV is None else dC_BHKV
        dn_BHK = torch.zeros_like(n_BHK) if dn_BHK is None else dn_BHK
    kept = (d_HBT, C_MHBKV, n_MHBK, m_MHB)
    *gradients, dC_BHKV, dn_BHK = backward(
        *inputs, h_BTHV, C_BHKV, n_BHK, *kept, dh_BTHV, dC_BHKV, dn_BHK, *ctx.options
    )
    dstate = (None, None) if inputs[6] is None else (dC_BHKV, dn_BHK)
    return *gradients, None, *dstate, *(None,) * 7


backward = custom_operator("mlstm_chunkwise_backward", compute_backward, _backward_shapes)
forward = custom_operator(
    "mlstm_chunkwise",
    compute_forward,
    lambda q, k, v, i, f, resets, C, n, m, save, chunk_length, input_gate, normalize, eps, return_state: (
        _forward_shapes(q, v, save, chunk_length, return_state)
    ),
    gradients=_gradients,
    keep=_keep,
)


def _first_state(
    q_BTHK: Tensor,
    v_BTHV: Tensor,
    C_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    input_gate: str,
) -> State:
    """The state before the first block, heads before rows."""
    if C_BHKV is None or n_BHK is None or m_BH is None:
        C_BHKV, n_BHK, m_BH = empty_state(q_BTHK, v_BTHV, input_gate)
    C_HBKV, n_HBK, m_HB = (x.transpose(0, 1).to(gate_dtype(q_BTHK)).contiguous() for x in (C_BHKV, n_BHK, m_BH))
    return C_HBKV, n_HBK, m_HB


def _block_gates(
    block: Block,
    log_gates_BTH: tuple[Tensor, Tensor],
    m_HB: Tensor,
    resets_BT: Tensor | None,
    K: int,
    options: Options,
) -> BlockGates:
    """The weights of one block."""
    log_input, log_forget = (block.cut(x).permute(3, 0, 1, 2).contiguous() for x in log_gates_BTH)
    resets_BNL = None if resets_BT is None else block.cut(resets_BT)
    return block_gates(log_input, log_forget, m_HB, resets_BNL, stabilized=options.input_gate == "exp", scale=K**-0.5)


def _log_gates(
    i_BTH: Tensor, f_BTH: Tensor, resets_BT: Tensor | None, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The logarithms of both gates, in the state's type; 0 for the forget gate at resets: nothing is left to forget."""
    log_input_BTH = i_BTH.to(dtype)
    if options.input_gate == "sigmoid":
        log_input_BTH = F.logsigmoid(log_input_BTH)
    log_forget_BTH = F.logsigmoid(f_BTH.to(dtype))
    if resets_BT is not None:
        log_forget_BTH = log_forget_BTH.masked_fill(resets_BT[..., None], 0.0)
    return log_input_BTH, log_forget_BTH


def _blocks(T: int, chunk_length: int) -> list[Block]:
    """Blocks of whole chunks, then one of a single shorter chunk for the rest of the T steps."""
    whole, rest = divmod(T, chunk_length)
    blocks = [
        Block(first * chunk_length, min(BLOCK_CHUNKS, whole - first), chunk_length)
        for first in range(0, whole, BLOCK_CHUNKS)
    ]
    return [*blocks, Block(whole * chunk_length, 1, rest)] if rest else blocks
