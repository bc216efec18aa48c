"""One block of chunks of the mLSTM, forward and backward: the batched matrix products of the chunkwise form.

A block is taken in parts, some of its heads and rows at a time; G counts the chunks of a part. The scale K^-1/2 is in
the normalizer only: num and d are those of the unscaled query throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_lm.ops.mlstm.gates import BlockGates, weights_between_steps
from xlstm_lm.ops.mlstm.recurrence import State

CPU_PART_STEPS = 2048
"""Steps (of any rows and heads) in a part, for each CPU thread: few enough for the cache, enough to hide the calls."""


class Options(NamedTuple):
    """What the mLSTM computes and how, apart from its tensors."""

    chunk_length: int
    input_gate: str
    normalize: bool
    eps: float
    return_state: bool


class Parts:
    """How a block of H heads, B rows and N chunks is cut into parts, and its tensors with it.

    A part is some heads of all rows, or some rows of one head: its values in a contiguous H x B x ... tensor are
    contiguous.
    """

    def __init__(self, gates: BlockGates) -> None:
        _, self.H, B, self.N, L = gates.steps_5HBNL.shape
        self.heads, self.rows = self.H, B
        if gates.m_HB.device.type == "cpu":
            sequences = max(1, CPU_PART_STEPS * torch.get_num_threads() // (self.N * L))
            self.heads, self.rows = min(self.H, max(1, sequences // B)), min(B, sequences)
        self.weights = [part.flatten(1, 3)[..., None].unbind() for part in self.of(gates.steps_5HBNL, 1)]
        self.decay = [part.flatten(0, 1) for part in self.of(gates.decay_HBPS)]
        if gates.segment_BNL is None:
            self.segments = [None] * len(self.decay)
        else:
            self.segments = list(gates.segment_BNL.split(self.rows)) * len(gates.m_HB.split(self.heads))

    def of(self, x_HBX: Tensor, head_dim: int = 0) -> list[Tensor]:
        """The parts of a tensor whose rows follow its heads."""
        some_heads = x_HBX.split(self.heads, head_dim)
        return [part for heads in some_heads for part in heads.split(self.rows, head_dim + 1)]

    def of_block(self, x_BTHX: Tensor) -> list[Tensor]:
        """The parts (heads, rows, N, L, ...) of a block's inputs or outputs: views."""
        return self.of(x_BTHX.unflatten(1, (self.N, -1)).movedim(3, 0))


def forward_block(
    inputs: tuple[Tensor, Tensor, Tensor],
    gates: BlockGates,
    state: State,
    h_BTHV: Tensor,
    d_HBNL: Tensor,
    *,
    has_state: bool,
    needs_next: bool,
    options: Options,
) -> State:
    """Write h and d of one block of q, k, v and return the state after it (C and n without content unless
    `needs_next`).

    `has_state` is False where `state` is known to be the empty one.
    """
    parts, N, dtype = Parts(gates), gates.steps_5HBNL.shape[3], d_HBNL.dtype
    scale = inputs[0].shape[-1] ** -0.5
    next_C, next_n = torch.empty_like(state[0]), torch.empty_like(state[1])
    for (c, x, query, key, bound), decay, segment, q, k, v, h, d_out, C_in, n_in, C_out, n_out in zip(
        parts.weights,
        parts.decay,
        parts.segments,
        *(parts.of_block(x) for x in (*inputs, h_BTHV)),
        *(parts.of(x) for x in (d_HBNL, state[0], state[1], next_C, next_n)),
    ):
        q, k, v = _matrices(q, dtype), _matrices(k, dtype), _matrices(v, dtype)
        C, n = (C_in.flatten(0, 1), n_in.flatten(0, 1)) if has_state else (None, None)
        if needs_next or N > 1:
            weighted_k = k * key
            added_C, added_n = torch.bmm(weighted_k.mT, v), weighted_k.sum(1)
            if needs_next:
                C_out.copy_(_decayed(added_C, C, decay[:, N:]).view_as(C_out))
                n_out.copy_(_decayed(added_n, n, decay[:, N:]).view_as(n_out))
            if N > 1:  # else the one chunk meets the state as it came
                C, n = _decayed(added_C, C, decay[:, :N]), _decayed(added_n, n, decay[:, :N])
        weight = torch.bmm(q, k.mT).mul_(weights_between_steps(c, x, segment))
        num, d = torch.bmm(weight, v), weight.sum(-1, keepdim=True)
        if C is not None:
            weighted_q = q * query
            num.baddbmm_(weighted_q, C)
            d.baddbmm_(weighted_q, n[..., None])
        inverse = _inverse_normalizer(d, bound, scale, options)
        torch.mul(num.view(h.shape), inverse.view(*h.shape[:-1], 1), out=h)
        d_out.copy_(d.view(d_out.shape))
    return next_C, next_n, gates.m_HB


def backward_block(
    inputs: tuple[Tensor, Tensor, Tensor],
    gates: BlockGates,
    state: State,
    h_BTHV: Tensor,
    d_HBNL: Tensor,
    dh_BTHV: Tensor,
    dstate: tuple[Tensor, Tensor] | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    *,
    has_state: bool,
    options: Options,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Write the gradients of one block of q, k, v, given those of h and of the state after it (C, n).

    Returns k . dk, which is the gradient of the log input gate; q . dq - k . dk, which is what each step adds to the
    gradients of the log forget gates up to and with its own; and the gradients of C and n before the block (None
    unless `has_state`).
    """
    parts, N, dtype = Parts(gates), gates.steps_5HBNL.shape[3], d_HBNL.dtype
    reads_state, adds_to_state = has_state or N > 1, dstate is not None or N > 1
    bound_HBNL = gates.steps_5HBNL[4]
    inverse_HBNL = _inverse_normalizer(d_HBNL, bound_HBNL, inputs[0].shape[-1] ** -0.5, options)
    if options.normalize:
        towards_d_HBNL = d_HBNL.sign().neg_().mul_(d_HBNL.abs() > bound_HBNL)
    else:
        towards_d_HBNL = torch.zeros_like(d_HBNL)
    k_dk_HBNL, q_dq_HBNL = torch.empty_like(d_HBNL), torch.empty_like(d_HBNL)
    before = (torch.empty_like(state[0]), torch.empty_like(state[1])) if has_state else None
    nothing = [None] * len(parts.decay)
    for (
        ((c, x, query, key, _), decay, segment, q, k, v, h, dh, dq_out, dk_out, dv_out),
        (inverse, towards_d, k_dk, q_dq, C_in, n_in, C_dout, n_dout, C_din, n_din),
    ) in zip(
        zip(
            parts.weights,
            parts.decay,
            parts.segments,
            *(parts.of_block(x) for x in (*inputs, h_BTHV, dh_BTHV, *gradients)),
        ),
        zip(
            *(parts.of(x) for x in (inverse_HBNL, towards_d_HBNL, k_dk_HBNL, q_dq_HBNL, state[0], state[1])),
            *((nothing, nothing) if dstate is None else (parts.of(x) for x in dstate)),
            *((nothing, nothing) if before is None else (parts.of(x) for x in before)),
        ),
    ):
        q, k, v, h, dh = (_matrices(x, dtype) for x in (q, k, v, h, dh))
        dnum = dh * inverse.flatten(0, 2)[..., None]
        dv = dnum * h  # in the place where dv comes to stand
        delta = dv.sum(-1, keepdim=True).mul_(towards_d.flatten(0, 2)[..., None])  # dL/dd

        between = weights_between_steps(c, x, segment)
        weight = torch.bmm(q, k.mT).mul_(between)
        torch.bmm(weight.mT, dnum, out=dv)
        dscores = torch.bmm(dnum, v.mT, out=weight).add_(delta).mul_(between)
        dq, dk = torch.bmm(dscores, k), torch.bmm(dscores.mT, q)

        # Here C is kept as V x K: then but one product with it has to transpose.
        if adds_to_state:
            weighted_k = k * key
        C, n = (C_in.mT.flatten(0, 1), n_in.flatten(0, 1)) if has_state else (None, None)
        if N > 1:
            C = _decayed(torch.bmm(v.mT, weighted_k), C, decay[:, :N])
            n = _decayed(weighted_k.sum(1), n, decay[:, :N])
        dC = dn = None
        if reads_state:
            dq.addcmul_(torch.bmm(dnum, C).addcmul_(delta, n[:, None]), query)
            weighted_q = q * query
            dC, dn = torch.bmm(dnum.mT, weighted_q), torch.bmm(delta.mT, weighted_q)[:, 0]
        dC_out, dn_out = (C_dout.mT, n_dout) if adds_to_state and dstate is not None else (None, None)
        if has_state:
            C_din.copy_(_decayed_back(dC, dC_out, decay[..., :1]).mT.view(C_din.shape))
            n_din.copy_(_decayed_back(dn, dn_out, decay[..., :1]).view(n_din.shape))
        if adds_to_state:
            dC, dn = _decayed_back(dC, dC_out, decay[..., 1:]), _decayed_back(dn, dn_out, decay[..., 1:])
            dv.baddbmm_(weighted_k, dC.mT)
            dk.addcmul_(torch.bmm(v, dC).add_(dn[:, None]), key)

        for out, gradient in ((dq_out, dq), (dk_out, dk), (dv_out, dv)):
            out.copy_(gradient.view(out.shape))
        torch.sum(dk.mul_(k), -1, out=k_dk.flatten(0, 2))
        torch.sum(dq.mul_(q), -1, out=q_dq.flatten(0, 2))
    return k_dk_HBNL, q_dq_HBNL.sub_(k_dk_HBNL), before


def _matrices(x_HBNLX: Tensor, dtype: torch.dtype) -> Tensor:
    """A part's chunks as one batch of matrices (G, L, ...): a view if neither type nor layout stands against it."""
    if x_HBNLX.dtype != dtype:
        x_HBNLX = x_HBNLX.to(dtype, memory_format=torch.contiguous_format)
    return x_HBNLX.flatten(0, 2)


def _inverse_normalizer(d: Tensor, bound: Tensor, scale: float, options: Options) -> Tensor:
    """What num is multiplied with for h. Without normalization that takes it back to true units."""
    if not options.normalize:
        return bound.reciprocal()
    return torch.maximum(d.abs(), bound).add_(options.eps / scale).reciprocal_()


def _decayed(added: Tensor, initial: Tensor | None, decay: Tensor) -> Tensor:
    """States at the positions P of `decay` (sequences, P, 1 + N): of what N chunks each add, and of an initial one."""
    sequences, positions, sources = decay.shape
    states = torch.bmm(decay[..., 1:], added.view(sequences, sources - 1, -1))
    if initial is not None:
        states.baddbmm_(decay[..., :1], initial.reshape(sequences, 1, -1))
    return states.view(sequences * positions, *added.shape[1:])


def _decayed_back(dstates: Tensor | None, dlast: Tensor | None, decay: Tensor) -> Tensor:
    """The transpose of `_decayed`: gradients of what the sources of `decay` (sequences, N + 1, sources) add.

    `dstates` are the gradients of the states before the N chunks, `dlast` that of the state after them.
    """
    sequences, positions, sources = decay.shape
    shape = (dlast.flatten(0, 1) if dstates is None else dstates).shape[1:]
    if dstates is None:
        dadded = decay[:, -1, :, None] * dlast.reshape(sequences, 1, -1)
    else:
        dadded = torch.bmm(decay[:, :-1].mT, dstates.view(sequences, positions - 1, -1))
        if dlast is not None:
            dadded.baddbmm_(decay[:, -1:].mT, dlast.reshape(sequences, 1, -1))
    return dadded.view(sequences * sources, *shape)
