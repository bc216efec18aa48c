"""The mLSTM in batched matrix products over chunks of the sequence, with its exact backward written by hand.

A row is cut into chunks of L steps. Inside a chunk every step sees every earlier one through an L x L matrix, as in
attention; what is older arrives through the state before the chunk, and the states before all chunks of a block come
from one product with an N x N matrix of decays. Blocks of N chunks follow each other, so memory and time are linear
in T. A last block of a single, shorter chunk takes what is left over: any T will do.

The backward rebuilds all of this block by block, last block first, from the inputs, the output, the state before each
block and one number a step, the normalizer d. (arXiv 2405.04517, eq. 19-27; the chunkwise form: arXiv 2503.14376; the
backward is derived from it.)

Products are made in float32 (float64 for float64 inputs) whatever the type of q, k, v: 16-bit inputs lose nothing
more here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xlstm_lm.ops.mlstm.block import Options, backward_block, forward_block
from xlstm_lm.ops.mlstm.gates import BlockGates, block_gates
from xlstm_lm.ops.mlstm.recurrence import State, empty_state, gate_dtype, unit_stabilizer

BLOCK_CHUNKS = 16
"""Chunks a block: the decays between them cost N * K * V a chunk, the loop over blocks costs little."""


class Block(NamedTuple):
    """`chunks` chunks of `length` steps each, from step `start`."""

    start: int
    chunks: int
    length: int

    @property
    def steps(self) -> slice:
        """Where in the sequence."""
        return slice(self.start, self.start + self.chunks * self.length)

    def cut(self, x_BTX: Tensor) -> Tensor:
        """The block's part (B, N, L, ...) of a whole sequence."""
        return x_BTX[:, self.steps].unflatten(1, (self.chunks, self.length))


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
    input_gate: str = "exp",
    normalize: bool = True,
    chunk_length: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State | None]:
    """The mLSTM of `xlstm_lm.ops.mlstm.mlstm` (shapes, options and returns there), chunk by chunk.

    `chunk_length` None takes `default_chunk_length`. Not twice differentiable.
    """
    if initial_state is not None and input_gate == "sigmoid":
        initial_state = unit_stabilizer(initial_state)
    if chunk_length is None:
        chunk_length = default_chunk_length(q_BTHK.shape[-1], v_BTHV.shape[-1])
    options = Options(chunk_length, input_gate, normalize, eps, return_state)
    C_BHKV, n_BHK, m_BH = (None, None, None) if initial_state is None else initial_state
    h_BTHV, *state = _Chunkwise.apply(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, C_BHKV, n_BHK, m_BH, resets_BT, options)
    return h_BTHV, tuple(state) if return_state else None


def default_chunk_length(K: int, V: int) -> int:
    """The chunk length that was fastest: the L x L tiles and the K x V states should cost about the same."""
    return 64 if max(K, V) <= 256 else 128


class _Chunkwise(torch.autograd.Function):
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
        B, T, H, K = q_BTHK.shape
        dtype = gate_dtype(q_BTHK)
        initial = empty_state(q_BTHK, v_BTHV, options.input_gate) if C_BHKV is None else (C_BHKV, n_BHK, m_BH)
        state = tuple(x.transpose(0, 1).to(dtype).contiguous() for x in initial)
        h_BTHV = v_BTHV.new_empty(v_BTHV.shape)
        blocks = _blocks(T, options.chunk_length)
        saved = []
        with torch.autocast(q_BTHK.device.type, enabled=False):
            log_input_BTH, log_forget_BTH = _log_gates(i_BTH, f_BTH, resets_BT, options, dtype)
            for block in blocks:
                log_input, log_forget = (block.cut(x).permute(3, 0, 1, 2) for x in (log_input_BTH, log_forget_BTH))
                gates = block_gates(
                    log_input.contiguous(),
                    log_forget.contiguous(),
                    state[2],
                    None if resets_BT is None else block.cut(resets_BT),
                    stabilized=options.input_gate == "exp",
                    scale=K**-0.5,
                )
                d_HBNL = torch.empty(H, B, block.chunks, block.length, dtype=dtype, device=q_BTHK.device)
                next_state = forward_block(
                    (q_BTHK[:, block.steps], k_BTHK[:, block.steps], v_BTHV[:, block.steps]),
                    gates,
                    state,
                    h_BTHV[:, block.steps],
                    d_HBNL,
                    has_state=C_BHKV is not None or block.start > 0,
                    needs_next=options.return_state or block is not blocks[-1],
                    options=options,
                )
                saved += [*gates, d_HBNL, *state]
                state = next_state
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.has_state = C_BHKV is not None
        last = state if options.return_state else (None, None, None)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, resets_BT, h_BTHV, *last, *saved)
        if not options.return_state:
            return h_BTHV, None, None, None
        C, n, m = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in state)
        ctx.mark_non_differentiable(m)
        return h_BTHV, C, n, m

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dh_BTHV: Tensor | None, dC_BHKV: Tensor | None, dn_BHK: Tensor | None, _dm: None
    ) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, resets_BT, h_BTHV, C_HBKV, n_HBK, _m, *saved = ctx.saved_tensors
        dtype = gate_dtype(q_BTHK)
        if dh_BTHV is None:
            dh_BTHV = torch.zeros_like(h_BTHV)
        dstate = None
        if dC_BHKV is not None or dn_BHK is not None:
            dstate = tuple(
                torch.zeros_like(x) if dx is None else dx.transpose(0, 1).to(dtype).contiguous()
                for x, dx in ((C_HBKV, dC_BHKV), (n_HBK, dn_BHK))
            )
        dq_BTHK, dk_BTHK, dv_BTHV = (x.new_empty(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV))
        di_BTH, df_BTH = (x.new_empty(x.shape, dtype=dtype) for x in (i_BTH, f_BTH))
        next_state = (C_HBKV, n_HBK)
        size = len(BlockGates._fields) + 4
        blocks = _blocks(q_BTHK.shape[1], options.chunk_length)
        with torch.autocast(q_BTHK.device.type, enabled=False):
            for index, block in reversed(list(enumerate(blocks))):
                *gates, d_HBNL, C_HBKV, n_HBK, m_HB = saved[index * size : (index + 1) * size]
                q, k, v, h, dh, dq, dk, dv = (
                    x[:, block.steps] for x in (q_BTHK, k_BTHK, v_BTHV, h_BTHV, dh_BTHV, dq_BTHK, dk_BTHK, dv_BTHV)
                )
                k_dk_HBNL, difference_HBNL, before = backward_block(
                    (q, k, v),
                    BlockGates(*gates),
                    (C_HBKV, n_HBK, m_HB),
                    h,
                    d_HBNL,
                    dh,
                    dstate,
                    (dq, dk, dv),
                    has_state=ctx.has_state or block.start > 0,
                    options=options,
                )
                difference_HBT = difference_HBNL.flatten(2).flip(-1).cumsum(-1).flip(-1)
                if dstate is not None:  # all that follows the block acts on its gates through the state after it
                    difference_HBT += sum(
                        (x * dx).flatten(2).sum(-1, keepdim=True) for x, dx in zip(next_state, dstate)
                    )
                di_BTH[:, block.steps] = k_dk_HBNL.flatten(2).permute(1, 2, 0)
                df_BTH[:, block.steps] = difference_HBT.permute(1, 2, 0)
                dstate, next_state = before, (C_HBKV, n_HBK)
            df_BTH *= torch.sigmoid(-f_BTH.to(dtype))
            if resets_BT is not None:
                df_BTH.masked_fill_(resets_BT[..., None], 0.0)
            if options.input_gate == "sigmoid":
                di_BTH *= torch.sigmoid(-i_BTH.to(dtype))
        dC, dn = (x.transpose(0, 1) for x in dstate) if dstate is not None else (None, None)
        return dq_BTHK, dk_BTHK, dv_BTHV, di_BTH.to(i_BTH.dtype), df_BTH.to(f_BTH.dtype), dC, dn, None, None, None


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
