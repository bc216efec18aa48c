"""One block of chunks of the mLSTM, forward and backward: the batched matrix products of the chunkwise form.

A block is computed in parts, some of its heads and rows at a time; G counts the chunks of a part. The scale K^-1/2 is
in the normalizer only: num and d are those of the unscaled query throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_lm.ops.mlstm.gates import BlockGates, Reach, drop_unseen_, weights_between_steps
from xlstm_lm.ops.mlstm.recurrence import Options, State

CPU_PART_SIZE = 2**19
"""Numbers of k and v in a part, for each CPU thread: few enough for its cache, enough to hide the cost of the calls."""


class Parts:
    """The parts of a block of H heads, B rows and N chunks, and of its tensors.

    A part is some heads of all rows, or some rows of one head: its values in a contiguous H x B x ... tensor are
    contiguous.
    """

    def __init__(self, gates: BlockGates, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
        _, H, B, self.N, L = gates.steps_FHBNL.shape
        self.heads, self.rows = H, B
        if gates.m_HB.device.type == "cpu":
            size = self.N * L * (k_BTHK.shape[-1] + v_BTHV.shape[-1])
            sequences = max(1, CPU_PART_SIZE * torch.get_num_threads() // size)
            self.heads, self.rows = min(H, max(1, sequences // B)), min(B, sequences)
        self.weights = [part.flatten(1, 3)[..., None].unbind() for part in self.of(gates.steps_FHBNL, 1)]
        self.decay = [part.flatten(0, 1) for part in self.of(gates.decay_HBPS)]
        if gates.segment_BNL is None:
            self.reach: list[Reach | None] = [None] * len(self.decay)
        else:
            reach = Reach.of(gates.segment_BNL, gates.m_HB.dtype)
            rows = map(Reach, *(x.split(self.rows) for x in reach))
            self.reach = [*rows] * len(gates.m_HB.split(self.heads))

    def of(self, x_HBX: Tensor, head_dim: int = 0) -> list[Tensor]:
        """The parts of a tensor whose rows follow its heads."""
        some_heads = x_HBX.split(self.heads, head_dim)
        if self.rows == x_HBX.shape[head_dim + 1]:
            return list(some_heads)
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
    parts, N, dtype = Parts(gates, *inputs[1:]), gates.steps_FHBNL.shape[3], d_HBNL.dtype
    scale = inputs[0].shape[-1] ** -0.5
    next_C, next_n = torch.empty_like(state[0]), torch.empty_like(state[1])
    for (key, bound, unit, *apart), decay, reach, q, k, v, h, d_out, C_in, n_in, C_out, n_out in zip(
        parts.weights,
        parts.decay,
        parts.reach,
        *(parts.of_block(x) for x in (*inputs, h_BTHV)),
        *(parts.of(x) for x in (d_HBNL, state[0], state[1], next_C, next_n)),
    ):
        q, k, v = _matrices(q, dtype), _matrices(k, dtype), _matrices(v, dtype)
        C_before, n_before = (C_in, n_in) if has_state else (None, None)
        weighted_q, weighted_k, weight, *_ = _weighted(q, k, key, apart, reach)
        num, d = torch.bmm(weight, v), weight.sum(-1, keepdim=True)
        added_C = added_n = None
        if needs_next or N > 1:
            added_C, added_n = torch.bmm(weighted_k.mT, v), weighted_k.sum(1)
        if needs_next:
            C_out.copy_(_decayed(added_C, C_before, decay[:, N:]).view_as(C_out))
            n_out.copy_(_decayed(added_n, n_before, decay[:, N:]).view_as(n_out))
        if has_state or N > 1:
            if N == 1:
                added_C = added_n = None
            num.baddbmm_(weighted_q, _decayed(added_C, C_before, decay[:, :N]))
            d.baddbmm_(weighted_q, _decayed(added_n, n_before, decay[:, :N])[..., None])
        inverse = _inverse_normalizer(d, bound, unit, scale, options)
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

    Returns k . dk, the gradient of the log input gate; q . dq - k . dk, the term that each step adds to the gradients
    of the log forget gates up to and with its own; and the gradients of C and n before the block (None unless
    `has_state`).
    """
    parts = Parts(gates, *inputs[1:])
    _, bound_HBNL, unit_HBNL, *_ = gates.steps_FHBNL
    inverse_HBNL = _inverse_normalizer(d_HBNL, bound_HBNL, unit_HBNL, inputs[0].shape[-1] ** -0.5, options)
    if options.normalize:
        towards_d_HBNL = d_HBNL.sign().neg_().mul_(d_HBNL.abs() > bound_HBNL)
    else:
        towards_d_HBNL = torch.zeros_like(d_HBNL)
    k_dk_HBNL, q_dq_HBNL = torch.empty_like(d_HBNL), torch.empty_like(d_HBNL)
    before = (torch.empty_like(state[0]), torch.empty_like(state[1])) if has_state else None
    nothing = [None] * len(parts.decay)
    for tensors in zip(
        parts.weights,
        parts.decay,
        parts.reach,
        *(parts.of_block(x) for x in (*inputs, h_BTHV, dh_BTHV, *gradients)),
        *(parts.of(x) for x in (inverse_HBNL, towards_d_HBNL, k_dk_HBNL, q_dq_HBNL)),
        *(parts.of(x) if has_state else nothing for x in state[:2]),
        *(nothing if x is None else parts.of(x) for x in dstate or (None, None)),
        *(nothing if x is None else parts.of(x) for x in before or (None, None)),
    ):
        _backward_part(*tensors)
    return k_dk_HBNL, q_dq_HBNL.sub_(k_dk_HBNL), before


def _backward_part(
    weights: Sequence[Tensor],
    decay: Tensor,
    reach: Reach | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    dh: Tensor,
    dq_out: Tensor,
    dk_out: Tensor,
    dv_out: Tensor,
    inverse: Tensor,
    towards_d: Tensor,
    k_dk: Tensor,
    q_dq: Tensor,
    C_in: Tensor | None,
    n_in: Tensor | None,
    dC_out: Tensor | None,
    dn_out: Tensor | None,
    dC_in: Tensor | None,
    dn_in: Tensor | None,
) -> None:
    """Write the gradients of a part: `dq_out` to `dv_out`, `k_dk`, `q_dq`, and `dC_in` and `dn_in` if given."""
    key, _, _, *apart = weights
    N, dtype = decay.shape[-1] - 1, inverse.dtype
    q, k, v, h, dh = (_matrices(x, dtype) for x in (q, k, v, h, dh))
    dnum = dh * inverse.flatten(0, 2)[..., None]
    dv = dnum * h  # its memory is dv's, later
    towards_d = towards_d.flatten(0, 2)[..., None]
    delta = dv.sum(-1, keepdim=True).mul_(towards_d).masked_fill_(towards_d == 0, 0.0)  # dL/dd; the sum may overflow

    weighted_q, weighted_k, weight, seen_k, between = _weighted(q, k, key, apart, reach)
    torch.bmm(weight.mT, dnum, out=dv)
    dscores = torch.bmm(dnum, v.mT, out=weight).add_(delta)
    if between is None:
        drop_unseen_(dscores, reach)
    else:
        dscores.mul_(between)

    # Here C is kept as V x K: only one product with it has to transpose.
    C_in, dC_out = (None if x is None else x.mT for x in (C_in, dC_out))
    dq_state = dk_state = dC = dn = None
    if C_in is not None or N > 1:
        added_C, added_n = (torch.bmm(v.mT, weighted_k), weighted_k.sum(1)) if N > 1 else (None, None)
        C, n = _decayed(added_C, C_in, decay[:, :N]), _decayed(added_n, n_in, decay[:, :N])
        dq_state = torch.bmm(dnum, C).addcmul_(delta, n[:, None])
        dC, dn = torch.bmm(dnum.mT, weighted_q, out=C), torch.bmm(delta.mT, weighted_q)[:, 0]
    if dC_in is not None and dn_in is not None:
        dC_in.copy_(_decayed_back(dC, dC_out, decay[..., :1]).view(dC_in.mT.shape).mT)
        dn_in.copy_(_decayed_back(dn, dn_out, decay[..., :1]).view(dn_in.shape))
    if dC_out is not None or N > 1:
        dC, dn = _decayed_back(dC, dC_out, decay[..., 1:]), _decayed_back(dn, dn_out, decay[..., 1:])
        dv.baddbmm_(weighted_k, dC.mT)
        dk_state = torch.bmm(v, dC).add_(dn[:, None])
    dq, dk = _unweighted(q, seen_k, key, apart, reach, dscores, dq_state, dk_state)

    for out, gradient in ((dq_out, dq), (dk_out, dk), (dv_out, dv)):
        out.copy_(gradient.view(out.shape))
    torch.sum(dk.mul_(k), -1, out=k_dk.flatten(0, 2))
    torch.sum(dq.mul_(q), -1, out=q_dq.flatten(0, 2))


def _matrices(x_HBNLX: Tensor, dtype: torch.dtype) -> Tensor:
    """A part's chunks as one batch of matrices (G, L, ...): a view if neither type nor layout stands against it."""
    if x_HBNLX.dtype != dtype:
        x_HBNLX = x_HBNLX.to(dtype, memory_format=torch.contiguous_format)
    return x_HBNLX.flatten(0, 2)


def _weighted(
    q: Tensor, k: Tensor, key: Tensor, apart: Sequence[Tensor], reach: Reach | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q as it reads the state, k as it adds to it, the values' weights in the chunk, k as q meets it there, the factor.

    `apart` (query, c, x) is empty where one stabilizer serves each segment: then weighing k is all there is to do, and
    no L x L factor stands between q and k.
    """
    if apart:
        query, c, x = apart
        between = weights_between_steps(c, x, reach)
        return q * query, k * key, torch.bmm(q, k.mT).mul_(between), k, between
    seen_k = weighted_k = k * key
    weight = drop_unseen_(torch.bmm(q, seen_k.mT), reach)
    if reach is not None:
        q, weighted_k = _by_row(q, reach.first_BNL1), _by_row(seen_k, reach.last_BNL1)
    return q, weighted_k, weight, seen_k, None


def _unweighted(
    q: Tensor,
    seen_k: Tensor,
    key: Tensor,
    apart: Sequence[Tensor],
    reach: Reach | None,
    dscores: Tensor,
    dq_state: Tensor | None,
    dk_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k through `_weighted`: from `dscores` of the products in the chunk and from the states."""
    if apart:
        dq, dk = torch.bmm(dscores, seen_k), torch.bmm(dscores.mT, q)
        if dq_state is not None:
            dq.addcmul_(dq_state, apart[0])
        if dk_state is not None:
            dk.addcmul_(dk_state, key)
        return dq, dk
    if reach is not None:
        dq_state = None if dq_state is None else _by_row(dq_state, reach.first_BNL1)
        dk_state = None if dk_state is None else _by_row(dk_state, reach.last_BNL1)
    dq = torch.bmm(dscores, seen_k) if dq_state is None else dq_state.baddbmm_(dscores, seen_k)
    dk = torch.bmm(dscores.mT, q) if dk_state is None else dk_state.baddbmm_(dscores.mT, q)
    return dq, dk.mul_(key)


def _by_row(x_GLX: Tensor, factor_BNL1: Tensor) -> Tensor:
    """x times a factor for each row, the same for all heads."""
    return (x_GLX.unflatten(0, (-1, *factor_BNL1.shape[:2])) * factor_BNL1).view(x_GLX.shape)


def _inverse_normalizer(d: Tensor, bound: Tensor, unit: Tensor, scale: float, options: Options) -> Tensor:
    """The factor of num in h. Without normalization it converts num to true units."""
    if not options.normalize:
        return bound.reciprocal()
    return torch.maximum(d.abs(), bound).add_(unit, alpha=options.eps / scale).reciprocal_()


def _decayed(added: Tensor | None, initial: Tensor | None, decay: Tensor) -> Tensor:
    """States at the positions P of `decay` (sequences, P, 1 + N), from the sums that N chunks add and an initial state.

    One of the two may be None.
    """
    sequences, positions, sources = decay.shape
    if added is None:
        assert initial is not None
        return (decay[..., :1] * initial.reshape(sequences, 1, -1)).view(sequences * positions, *initial.shape[2:])
    states = torch.bmm(decay[..., 1:], added.view(sequences, sources - 1, -1))
    if initial is not None:
        states.baddbmm_(decay[..., :1], initial.reshape(sequences, 1, -1))
    return states.view(sequences * positions, *added.shape[1:])


def _decayed_back(dstates: Tensor | None, dlast: Tensor | None, decay: Tensor) -> Tensor:
    """The transpose of `_decayed`: gradients of the sources of `decay` (sequences, N + 1, sources).

    `dstates` are the gradients of the states before the N chunks, `dlast` that of the state after them.
    """
    sequences, positions, sources = decay.shape
    if dstates is None:
        assert dlast is not None
        shape = dlast.shape[2:]
        dadded = decay[:, -1, :, None] * dlast.reshape(sequences, 1, -1)
    else:
        shape = dstates.shape[1:]
        dadded = torch.bmm(decay[:, :-1].mT, dstates.view(sequences, positions - 1, -1))
        if dlast is not None:
            dadded.baddbmm_(decay[:, -1:].mT, dlast.reshape(sequences, 1, -1))
    return dadded.view(sequences * sources, *shape)
