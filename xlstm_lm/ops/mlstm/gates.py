"""The weights that the chunkwise mLSTM multiplies with, none above 1, from the gates of one block of chunks.

Within a chunk let b be the running sum of the log forget gates and c = log input gate - b. Step s weighs
exp(b_t + c_s - m_t) at a later step t of its chunk, where m_t is the recurrent stabilizer. With x_t = m_t - b_t that is
exp(c_s - x_t), and x_t is simply the running maximum of c that starts at the m before the chunk. (Chunkwise form: arXiv
2503.14376.)

Any stabilizer is right with which nothing overflows or vanishes. Where x rises little in a chunk, its last value z (in
each segment between resets) serves all steps: then exp(c_s - z) is a weight of the key alone, and no L x L exponentials
are needed. Only eps has to be scaled, by exp(x_t - z).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST_RISE = 40.0
"""The largest rise of x within a segment that one stabilizer serves: float32 has room for exp(40) squared."""


class BlockGates(NamedTuple):
    """The weights of one block of N chunks of L steps. Heads come first: the numbers of a head are contiguous."""

    steps_FHBNL: Tensor
    """F numbers a step: `key`, the weight of the step in what its chunk adds to the state; `bound`, the lower bound
    exp(-stabilizer) / scale of the normalizer of an unscaled query; `unit`, the factor of eps beside it; and, unless
    one stabilizer serves whole segments, `query`, the weight of the state before the chunk at this step, c and x."""
    decay_HBPS: Tensor
    """Weight in the state at position p = 0..N of source s: 0 the initial state, else what chunk s - 1 adds. With one
    stabilizer a segment the weight of the state before a chunk at each of its steps is in here too (p < N)."""
    m_HB: Tensor
    """Stabilizer of the state after the block."""
    segment_BNL: Tensor | None
    """Number of resets in the chunk up to and with this step (None without resets)."""


class Reach(NamedTuple):
    """The steps and states in reach within each chunk despite resets, as ones and zeros to multiply with."""

    seen_BNLL: Tensor
    """1 where step t sees step s: not after it, and no reset in between."""
    first_BNL1: Tensor
    """1 before the first reset, where the state before the chunk is read."""
    last_BNL1: Tensor
    """1 from the last reset on, where steps add to the state after the chunk."""

    @classmethod
    def of(cls, segment_BNL: Tensor, dtype: torch.dtype) -> Reach:
        """Build it from the number of resets up to each step."""
        seen_BNLL = (segment_BNL[..., :, None] == segment_BNL[..., None, :]).to(dtype).tril_()
        first_BNL, last_BNL = segment_BNL == 0, segment_BNL == segment_BNL[..., -1:]
        return cls(seen_BNLL, first_BNL[..., None].to(dtype), last_BNL[..., None].to(dtype))


def weights_between_steps(c_GL1: Tensor, x_GL1: Tensor, reach: Reach | None) -> Tensor:
    """Weight of step s at step t of its chunk, (G, L, L) for G = heads * B * N; 0 unless s reaches t."""
    weight_GLL = c_GL1.mT - x_GL1
    # Above the diagonal the difference may be anything: keep exp finite there, then drop it.
    return drop_unseen_(weight_GLL.clamp_max_(0.0).exp_(), reach)


def drop_unseen_(weight_GLL: Tensor, reach: Reach | None) -> Tensor:
    """Set to 0 in place the weights of steps that step t does not see: those after it or before a reset."""
    if reach is None:
        return weight_GLL.tril_()
    weight_GLL.view(-1, *reach.seen_BNLL.shape).mul_(reach.seen_BNLL)
    return weight_GLL


def block_gates(
    log_input_HBNL: Tensor,
    log_forget_HBNL: Tensor,
    m_HB: Tensor,
    resets_BNL: Tensor | None,
    *,
    stabilized: bool,
    scale: float,
) -> BlockGates:
    """The weights of one block from its log gates, the stabilizer before it and the scale of the queries.

    `stabilized` is False for the sigmoid input gate, whose stabilizer is 0 throughout. The log forget gate must be 0 at
    resets.
    """
    smallest = torch.finfo(m_HB.dtype).min
    b_HBNL = log_forget_HBNL.cumsum(-1)
    c_HBNL = log_input_HBNL - b_HBNL

    # Sums over many chunks are differences of large numbers: float64, on tensors of N x N at most.
    chunk_HBN = b_HBNL[..., -1].double()
    passed_HBP = pad(chunk_HBN.cumsum(-1), (1, 0))
    between_HBPS = passed_HBP[..., :, None] - passed_HBP[..., None, :]
    apart_PS = torch.ones(between_HBPS.shape[-2:], dtype=torch.bool, device=m_HB.device).triu_(1)
    segment_BNL = None
    if resets_BNL is not None:
        segment_BNL = resets_BNL.cumsum(-1)
        before_first, after_last = segment_BNL == 0, segment_BNL == segment_BNL[..., -1:]
        resets_BP = pad(segment_BNL[..., -1].cumsum(-1), (1, 0))
        apart_PS = apart_PS | (resets_BP[:, :, None] != resets_BP[:, None, :])

    if stabilized:
        running_HBNL = c_HBNL.cummax(-1).values if segment_BNL is None else _cummax_in_segments(c_HBNL, segment_BNL)
        m_of_source_HBS = torch.cat([m_HB[..., None].double(), chunk_HBN + running_HBNL[..., -1]], -1)
        reaching_HBPS = (between_HBPS + m_of_source_HBS[..., None, :]).masked_fill_(apart_PS, float("-inf"))
        m_HBP = reaching_HBPS.amax(-1).clamp_min_(smallest).to(m_HB.dtype)
        before_HBN1 = m_HBP[..., :-1, None]
        if segment_BNL is None:
            x_HBNL = torch.maximum(running_HBNL, before_HBN1)
        else:
            x_HBNL = torch.maximum(running_HBNL, before_HBN1.where(before_first, smallest))
    else:
        m_HBP = m_HB.new_zeros(passed_HBP.shape)
        x_HBNL = -b_HBNL

    last_HBN1 = x_HBNL[..., -1:]
    m_of_source_HBS = torch.cat([m_HB[..., None].double(), chunk_HBN + last_HBN1[..., 0]], -1)
    decay_HBPS = (
        (between_HBPS + m_of_source_HBS[..., None, :]).sub_(m_HBP[..., None]).exp_().masked_fill_(apart_PS, 0.0)
    )
    if segment_BNL is None:
        serving_HBNL = last_HBN1.expand_as(x_HBNL)
    else:  # x does not fall within a segment: its last value is the maximum seen from the end
        serving_HBNL = _cummax_in_segments(x_HBNL.flip(-1), segment_BNL.flip(-1)).flip(-1)
    # Not on a GPU, where the host would wait for the result, nor in an exported program, which serves any input.
    look = m_HB.device.type == "cpu" and not torch.compiler.is_exporting()
    if look and (serving_HBNL - x_HBNL).amax() <= LARGEST_RISE:
        decay_HBPS[..., :-1, :].mul_((m_HBP[..., :-1] - serving_HBNL[..., 0]).clamp_max_(0.0).exp_()[..., None])
        exponents = torch.stack(
            [c_HBNL - serving_HBNL, -b_HBNL - serving_HBNL - math.log(scale), x_HBNL - serving_HBNL]
        )
        steps_FHBNL = exponents.exp_()
    else:
        query_HBNL = (m_HBP[..., :-1, None] - x_HBNL).clamp_max_(0.0).exp_()
        key_HBNL = (c_HBNL - last_HBN1).clamp_max_(0.0).exp_()
        if segment_BNL is not None:
            query_HBNL, key_HBNL = query_HBNL * before_first, key_HBNL * after_last
        bound_HBNL = (-b_HBNL - x_HBNL).exp_().div_(scale)
        steps_FHBNL = torch.stack([key_HBNL, bound_HBNL, torch.ones_like(b_HBNL), query_HBNL, c_HBNL, x_HBNL])
    return BlockGates(
        steps_FHBNL=steps_FHBNL, decay_HBPS=decay_HBPS.to(m_HB.dtype), m_HB=m_HBP[..., -1], segment_BNL=segment_BNL
    )


def _cummax_in_segments(c_HBNL: Tensor, segment_BNL: Tensor) -> Tensor:
    """The running maximum of c along L that starts afresh in each segment, in log2(L) doublings."""
    shift = 1
    while shift < c_HBNL.shape[-1]:
        same = segment_BNL[..., shift:] == segment_BNL[..., :-shift]
        earlier = c_HBNL[..., :-shift].where(same, float("-inf"))
        c_HBNL = torch.cat([c_HBNL[..., :shift], torch.maximum(c_HBNL[..., shift:], earlier)], -1)
        shift *= 2
    return c_HBNL
