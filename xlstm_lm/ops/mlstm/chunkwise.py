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

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xlstm_lm.ops.mlstm.gates import BlockGates, block_gates
from xlstm_lm.ops.mlstm.recurrence import State, empty_state, gate_dtype, unit_stabilizer

BLOCK_CHUNKS = 16
"""Chunks a block: the decays between them cost N * K * V a chunk, the loop over blocks costs little."""
CPU_PASS_STEPS = 2048
"""Steps (of any rows and heads) that one pass takes on a CPU thread, so that its tiles stay in the cache."""


class Options(NamedTuple):
    """What the function computes and how, apart from its tensors."""

    chunk_length: int
    input_gate: str
    normalize: bool
    eps: float
    return_state: bool


class Block(NamedTuple):
    """`chunks` chunks of `length` steps each, from step `start`."""

    start: int
    chunks: int
    length: int

    @property
    def steps(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.length)


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
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.has_state = C_BHKV is not None
        dtype = gate_dtype(q_BTHK)
        blocks = _blocks(q_BTHK.shape[1], options.chunk_length)
        if ctx.has_state:
            state = tuple(x.transpose(0, 1).to(dtype).contiguous() for x in (C_BHKV, n_BHK, m_BH))
        else:
            state = tuple(x.transpose(0, 1) for x in empty_state(q_BTHK, v_BTHV, options.input_gate))
        h_BTHV = v_BTHV.new_empty(*q_BTHK.shape[:3], v_BTHV.shape[-1])
        d_BTH = i_BTH.new_empty(i_BTH.shape, dtype=dtype)
        states = [state]
        with torch.autocast(q_BTHK.device.type, enabled=False):
            log_input_BTH, log_forget_BTH = _log_gates(i_BTH, f_BTH, resets_BT, options, dtype)
            for index, block in enumerate(blocks):
                gates = _gates_of(block, log_input_BTH, log_forget_BTH, state[2], resets_BT, options)
                needs_next = options.return_state or index + 1 < len(blocks)
                block_inputs = (x[:, block.steps] for x in (q_BTHK, k_BTHK, v_BTHV))
                state = _forward_block(
                    *block_inputs,
                    gates,
                    state,
                    h_BTHV[:, block.steps],
                    d_BTH[:, block.steps],
                    has_state=ctx.has_state or index > 0,
                    needs_next=needs_next,
                    options=options,
                )
                states.append(state)
        if not options.return_state:
            states.pop()
        flat_states = [x for state in states for x in state]
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, resets_BT, h_BTHV, d_BTH, *flat_states)
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
        q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, resets_BT, h_BTHV, d_BTH, *flat_states = ctx.saved_tensors
        states = [tuple(flat_states[s : s + 3]) for s in range(0, len(flat_states), 3)]
        dtype = d_BTH.dtype
        if dh_BTHV is None:
            dh_BTHV = torch.zeros_like(h_BTHV)
        dq_BTHK, dk_BTHK, dv_BTHV = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BTHK, v_BTHV)
        )
        di_BTH, df_BTH = torch.empty_like(d_BTH), torch.empty_like(d_BTH)
        dstate = None
        if dC_BHKV is not None or dn_BHK is not None:
            C_HBKV, n_HBK, _ = states[-1]
            dstate = (
                torch.zeros_like(C_HBKV) if dC_BHKV is None else dC_BHKV.transpose(0, 1).to(dtype).contiguous(),
                torch.zeros_like(n_HBK) if dn_BHK is None else dn_BHK.transpose(0, 1).to(dtype).contiguous(),
            )
        blocks = _blocks(q_BTHK.shape[1], options.chunk_length)
        with torch.autocast(q_BTHK.device.type, enabled=False):
            log_input_BTH, log_forget_BTH = _log_gates(i_BTH, f_BTH, resets_BT, options, dtype)
            for index in reversed(range(len(blocks))):
                block = blocks[index]
                gates = _gates_of(block, log_input_BTH, log_forget_BTH, states[index][2], resets_BT, options)
                names = (q_BTHK, k_BTHK, v_BTHV, h_BTHV, d_BTH, dh_BTHV, dq_BTHK, dk_BTHK, dv_BTHV, di_BTH, df_BTH)
                next_dstate = dstate
                dstate = _backward_block(
                    *(x[:, block.steps] for x in names),
                    gates,
                    states[index],
                    dstate,
                    has_state=ctx.has_state or index > 0,
                    options=options,
                )
                df_block_BTH = df_BTH[:, block.steps]
                df_block_BTH.copy_(df_block_BTH.flip(1).cumsum(1).flip(1))
                if next_dstate is not None:
                    df_block_BTH += _inner(states[index + 1], next_dstate).t()[:, None]
            df_BTH *= torch.sigmoid(-f_BTH.to(dtype))
            if resets_BT is not None:
                df_BTH.masked_fill_(resets_BT[..., None], 0.0)
            if options.input_gate == "sigmoid":
                di_BTH *= torch.sigmoid(-i_BTH.to(dtype))
        dC, dn = (x.transpose(0, 1) for x in dstate) if dstate is not None else (None, None)
        return dq_BTHK, dk_BTHK, dv_BTHV, di_BTH.to(i_BTH.dtype), df_BTH.to(f_BTH.dtype), dC, dn, None, None, None


def _forward_block(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gates: BlockGates,
    state: State,
    h_BTHV: Tensor,
    d_BTH: Tensor,
    *,
    has_state: bool,
    needs_next: bool,
    options: Options,
) -> State:
    """Write h and d of one block and return the state after it (C and n without content if they are not needed)."""
    H, B, N, L = gates.c_HBNL.shape
    scale = q_BTHK.shape[-1] ** -0.5
    C_HBKV, n_HBK, _ = state
    next_C, next_n = torch.empty_like(C_HBKV), torch.empty_like(n_HBK)
    reads_state = has_state or N > 1
    for part in _parts(H, B, N * L, q_BTHK.device):
        q, k, v = (_tiles(x, part, N, d_BTH.dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
        decay_GPS = gates.decay_HBPS[part].flatten(0, 1)
        C_in, n_in = (C_HBKV[part], n_HBK[part]) if has_state else (None, None)
        if needs_next or N > 1:
            weighted_k = k * _column(gates.key_HBNL, part)
            added_C, added_n = torch.bmm(weighted_k.mT, v), weighted_k.sum(1)
        if needs_next:
            next_C[part] = _decayed(added_C, C_in, decay_GPS[:, N:]).view_as(next_C[part])
            next_n[part] = _decayed(added_n, n_in, decay_GPS[:, N:]).view_as(next_n[part])
        weight = torch.bmm(q, k.mT)
        weight *= gates.between_steps(part)
        num, d = torch.bmm(weight, v), weight.sum(-1)
        if reads_state:
            C = _decayed(added_C, C_in, decay_GPS[:, :N]) if N > 1 else C_in.flatten(0, 1)
            n = _decayed(added_n, n_in, decay_GPS[:, :N]) if N > 1 else n_in.flatten(0, 1)
            weighted_q = q * _column(gates.query_HBNL, part)
            num.baddbmm_(weighted_q, C)
            d += torch.bmm(weighted_q, n[..., None])[..., 0]
        d *= scale
        inverse = _inverse_normalizer(d, gates.bound_HBNL[part].flatten(0, 2), options) * scale
        h_view = _windows(h_BTHV, part, N)
        torch.mul(num.view(h_view.shape), inverse.view(*h_view.shape[:-1], 1), out=h_view)
        _windows(d_BTH, part, N).copy_(d.view(h_view.shape[:-1]))
    return next_C, next_n, gates.m_HB


def _backward_block(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    h_BTHV: Tensor,
    d_BTH: Tensor,
    dh_BTHV: Tensor,
    dq_BTHK: Tensor,
    dk_BTHK: Tensor,
    dv_BTHV: Tensor,
    di_BTH: Tensor,
    df_BTH: Tensor,
    gates: BlockGates,
    state: State,
    dstate: tuple[Tensor, Tensor] | None,
    *,
    has_state: bool,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """Write the gradients of one block's inputs and return those of C and n before it (None without such a state).

    Into `di` goes k . dk, the gradient of the log input gate, and into `df` q . dq - k . dk: what each step adds to the
    gradients of the log forget gates up to and with its own.
    """
    H, B, N, L = gates.c_HBNL.shape
    dtype = d_BTH.dtype
    scale = q_BTHK.shape[-1] ** -0.5
    C_HBKV, n_HBK, _ = state
    before_dC, before_dn = torch.empty_like(C_HBKV), torch.empty_like(n_HBK)
    reads_state, adds_to_state = has_state or N > 1, dstate is not None or N > 1
    for part in _parts(H, B, N * L, q_BTHK.device):
        q, k, v, h, dh = (_tiles(x, part, N, dtype) for x in (q_BTHK, k_BTHK, v_BTHV, h_BTHV, dh_BTHV))
        decay_GPS = gates.decay_HBPS[part].flatten(0, 1)
        d, bound = _windows(d_BTH, part, N).flatten(0, 2), gates.bound_HBNL[part].flatten(0, 2)
        # num and d are those of the unscaled q from here on: scale is in the gradients that reach them.
        dnum = dh * (_inverse_normalizer(d, bound, options) * scale)[..., None]
        delta = None
        if options.normalize:
            delta = (dnum * h).sum(-1).neg_() * d.sign() * (d.abs() > bound)

        between = gates.between_steps(part)
        weight = torch.bmm(q, k.mT)
        weight *= between
        dv = torch.bmm(weight.mT, dnum)
        dscores = torch.bmm(dnum, v.mT, out=weight)
        if delta is not None:
            dscores += delta[..., None]
        dscores *= between

        key_weight = _column(gates.key_HBNL, part) if adds_to_state else None
        weighted_k = k * key_weight if adds_to_state else None
        added_dC = added_dn = None
        if reads_state:
            query_weight = _column(gates.query_HBNL, part)
            weighted_q = q * query_weight
            # C is kept as V x K here, so that no product has to transpose it.
            C_in, n_in = (C_HBKV[part].mT.contiguous(), n_HBK[part]) if has_state else (None, None)
            C = _decayed(torch.bmm(v.mT, weighted_k), C_in, decay_GPS[:, :N]) if N > 1 else C_in.flatten(0, 1)
            n = _decayed(weighted_k.sum(1), n_in, decay_GPS[:, :N]) if N > 1 else n_in.flatten(0, 1)
            dq = torch.bmm(dnum, C)
            if delta is not None:
                dq.addcmul_(delta[..., None], n[:, None])
            dq *= query_weight
            dq.baddbmm_(dscores, k)
            added_dC = torch.bmm(weighted_q.mT, dnum)
            added_dn = torch.bmm(weighted_q.mT, delta[..., None])[..., 0] if delta is not None else torch.zeros_like(n)
        else:
            dq = torch.bmm(dscores, k)
        out_dC, out_dn = (dstate[0][part], dstate[1][part]) if dstate is not None else (None, None)
        if has_state:
            before_dC[part] = _decayed_back(added_dC, out_dC, decay_GPS[..., :1]).view_as(before_dC[part])
            before_dn[part] = _decayed_back(added_dn, out_dn, decay_GPS[..., :1]).view_as(before_dn[part])
        if adds_to_state:
            dC = _decayed_back(added_dC, out_dC, decay_GPS[..., 1:])
            dn = _decayed_back(added_dn, out_dn, decay_GPS[..., 1:])
            dv.baddbmm_(weighted_k, dC)
            dk = torch.bmm(v, dC.mT)
            dk += dn[:, None]
            dk *= key_weight
            dk.baddbmm_(dscores.mT, q)
        else:
            dk = torch.bmm(dscores.mT, q)

        for x, gradient in ((dq_BTHK, dq), (dk_BTHK, dk), (dv_BTHV, dv)):
            view = _windows(x, part, N)
            view.copy_(gradient.view(view.shape))
        di = dk.mul_(k).sum(-1)
        di_view = _windows(di_BTH, part, N)
        di_view.copy_(di.view(di_view.shape))
        _windows(df_BTH, part, N).copy_(dq.mul_(q).sum(-1).sub_(di).view(di_view.shape))
    return (before_dC, before_dn) if has_state else None


def _decayed(added: Tensor, initial: Tensor | None, decay_GPS: Tensor) -> Tensor:
    """States (G * P, ...) at positions P, of what N chunks added (G * N, ...) and an initial state (heads, rows, ...)."""
    G, P, S = decay_GPS.shape
    state_GPX = torch.bmm(decay_GPS[..., 1:], added.view(G, S - 1, -1))
    if initial is not None:
        state_GPX.baddbmm_(decay_GPS[..., :1], initial.reshape(G, 1, -1))
    return state_GPX.view(G * P, *added.shape[1:])


def _decayed_back(dstates: Tensor | None, dlast: Tensor | None, decay_GPS: Tensor) -> Tensor:
    """The transpose of `_decayed`: gradients (G * S, ...) of what S sources added.

    `dstates` (G * N, ...) are the gradients of the states before the chunks, `dlast` (heads, rows, ...) that of the
    one after.
    """
    G, P, S = decay_GPS.shape
    source_GSP = decay_GPS.mT
    if dstates is None:
        dsource_GSX = source_GSP[..., -1:] * dlast.reshape(G, 1, -1)
        return dsource_GSX.view(G * S, *dlast.shape[2:])
    dsource_GSX = torch.bmm(source_GSP[..., :-1], dstates.view(G, P - 1, -1))
    if dlast is not None:
        dsource_GSX.baddbmm_(source_GSP[..., -1:], dlast.reshape(G, 1, -1))
    return dsource_GSX.view(G * S, *dstates.shape[1:])


def _inverse_normalizer(d: Tensor, bound: Tensor, options: Options) -> Tensor:
    """What num is multiplied with. Without normalization that takes it back to true units."""
    if not options.normalize:
        return bound.reciprocal()
    return torch.maximum(d.abs(), bound).add_(options.eps).reciprocal_()


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


def _gates_of(
    block: Block,
    log_input_BTH: Tensor,
    log_forget_BTH: Tensor,
    m_HB: Tensor,
    resets_BT: Tensor | None,
    options: Options,
) -> BlockGates:
    """The weights of a block."""
    log_input_HBNL, log_forget_HBNL = (
        x[:, block.steps].unflatten(1, (block.chunks, -1)).permute(3, 0, 1, 2).contiguous()
        for x in (log_input_BTH, log_forget_BTH)
    )
    resets_BNL = None if resets_BT is None else resets_BT[:, block.steps].unflatten(1, (block.chunks, -1))
    return block_gates(log_input_HBNL, log_forget_HBNL, m_HB, resets_BNL, stabilized=options.input_gate == "exp")


def _blocks(T: int, chunk_length: int) -> list[Block]:
    """Blocks of whole chunks, then one of a single shorter chunk for the rest of the T steps."""
    whole, rest = divmod(T, chunk_length)
    blocks = [
        Block(first * chunk_length, min(BLOCK_CHUNKS, whole - first), chunk_length)
        for first in range(0, whole, BLOCK_CHUNKS)
    ]
    return [*blocks, Block(whole * chunk_length, 1, rest)] if rest else blocks


def _parts(H: int, B: int, steps: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and rows to take at once: all of them, but on a CPU only what its cache holds."""
    if device.type != "cpu":
        heads, rows = H, B
    else:
        sequences = max(1, CPU_PASS_STEPS * torch.get_num_threads() // steps)
        rows = min(B, sequences)
        heads = max(1, sequences // B)
    for head in range(0, H, heads):
        for row in range(0, B, rows):
            yield slice(head, head + heads), slice(row, row + rows)


def _windows(x_BTHX: Tensor, part: tuple[slice, slice], chunks: int) -> Tensor:
    """The part's view of x as (heads, rows, N, L, ...)."""
    heads, rows = part
    return x_BTHX[rows, :, heads].unflatten(1, (chunks, -1)).movedim(3, 0)


def _tiles(x_BTHX: Tensor, part: tuple[slice, slice], chunks: int, dtype: torch.dtype) -> Tensor:
    """The part's chunks as a batch of matrices (heads * rows * N, L, ...): a view where the layout allows it."""
    windows = _windows(x_BTHX, part, chunks)
    if windows.dtype != dtype:
        windows = windows.to(dtype, memory_format=torch.contiguous_format)
    return windows.flatten(0, 2)


def _column(weight_HBNL: Tensor, part: tuple[slice, slice]) -> Tensor:
    """The part's weights, to multiply the rows of its tiles with."""
    return weight_HBNL[part].flatten(0, 2)[..., None]


def _inner(state: State, dstate: tuple[Tensor, Tensor]) -> Tensor:
    """<C, dC> + <n, dn> by head and row: what follows a state adds this to the gradients of log forget gates before."""
    return (state[0] * dstate[0]).sum((-2, -1)) + (state[1] * dstate[1]).sum(-1)
