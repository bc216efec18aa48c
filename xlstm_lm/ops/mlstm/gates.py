"""What the gates of one block of chunks amount to: the weights that the chunkwise mLSTM multiplies with, none above 1.

Within a chunk let b be the running sum of the log forget gates and c = log input gate - b. Step s weighs exp(b_t +
c_s - m_t) at a later step t of its chunk, where m_t is the recurrent stabilizer. With x_t = m_t - b_t that is exp(c_s
- x_t), and x_t is simply the running maximum of c that starts at the m before the chunk. (Chunkwise form: arXiv
2503.14376.)
"""

# ruff: noqa: N815  (tensor names carry their shape)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class BlockGates:
    """The weights of one block of N chunks of L steps; heads lead, so that a head's values lie together."""

    c_HBNL: Tensor
    """Log input gate less the running sum of log forget gates."""
    x_HBNL: Tensor
    """Stabilizer less the running sum of log forget gates; exp(c_s - x_t) is the weight of s at t."""
    query_HBNL: Tensor
    """Weight of the state before the chunk at each step; 0 behind a reset."""
    key_HBNL: Tensor
    """Weight of each step in what its chunk adds to the state; 0 before the chunk's last reset."""
    bound_HBNL: Tensor
    """exp(-m), the lower bound of the normalizer."""
    decay_HBPS: Tensor
    """Weight in the state at position p = 0..N between chunks of source s: the initial state, else what chunk s - 1 adds."""
    m_HB: Tensor
    """Stabilizer of the state after the block."""
    same_segment_BNLL: Tensor | None
    """True where no reset lies between s and t (None without resets)."""

    def between_steps(self, part: tuple[slice, slice]) -> Tensor:
        """Weight of step s at step t of its chunk, (heads * rows * N, L, L) of a part; 0 unless s reaches t."""
        c_GL, x_GL = self.c_HBNL[part].flatten(0, 2), self.x_HBNL[part].flatten(0, 2)
        weight_GLL = c_GL[:, None, :] - x_GL[:, :, None]
        # Above the diagonal the difference may be anything: keep exp finite there, then drop it.
        weight_GLL.clamp_max_(0.0).exp_().tril_()
        if self.same_segment_BNLL is not None:
            same_BNLL = self.same_segment_BNLL[part[1]]
            weight_GLL.unflatten(0, (-1, *same_BNLL.shape[:2])).mul_(same_BNLL)
        return weight_GLL


def block_gates(
    log_input_HBNL: Tensor, log_forget_HBNL: Tensor, m_HB: Tensor, resets_BNL: Tensor | None, stabilized: bool
) -> BlockGates:
    """The weights of one block from its log gates and the stabilizer before it.

    `stabilized` is False for the sigmoid input gate, whose stabilizer is 0 throughout. The log forget gate must be 0 at
    resets.
    """
    smallest = torch.finfo(log_input_HBNL.dtype).min
    b_HBNL = log_forget_HBNL.cumsum(-1)
    c_HBNL = log_input_HBNL - b_HBNL
    chunk_HBN = b_HBNL[..., -1]

    # Sums over many chunks are differences of large numbers: float64, on tensors of N x N at most.
    passed_HBP = torch.nn.functional.pad(chunk_HBN.double().cumsum(-1), (1, 0))
    between_HBPS = passed_HBP[..., :, None] - passed_HBP[..., None, :]
    positions = between_HBPS.shape[-1]
    apart_PS = torch.ones(positions, positions, dtype=torch.bool, device=m_HB.device).triu_(1)
    if resets_BNL is None:
        before_first = after_last = same_segment_BNLL = None
    else:
        segment_BNL = resets_BNL.cumsum(-1)
        before_first = segment_BNL == 0
        after_last = segment_BNL == segment_BNL[..., -1:]
        same_segment_BNLL = segment_BNL[..., :, None] == segment_BNL[..., None, :]
        resets_BP = torch.nn.functional.pad(segment_BNL[..., -1].cumsum(-1), (1, 0))
        apart_PS = apart_PS | (resets_BP[:, :, None] != resets_BP[:, None, :])

    if stabilized:
        running_HBNL = c_HBNL.cummax(-1).values if resets_BNL is None else _cummax_in_segments(c_HBNL, segment_BNL)
        sources_HBS = torch.cat([m_HB[..., None], chunk_HBN + running_HBNL[..., -1]], -1).double()
        m_HBP = (between_HBPS + sources_HBS[..., None, :]).masked_fill_(apart_PS, float("-inf")).amax(-1)
        m_HBP = m_HBP.clamp_min_(smallest).to(m_HB.dtype)
        before_HBN1 = m_HBP[..., :-1, None]
        if resets_BNL is not None:
            before_HBN1 = before_HBN1.where(before_first, smallest)
        x_HBNL = torch.maximum(running_HBNL, before_HBN1)
    else:
        m_HBP = m_HB.new_zeros(passed_HBP.shape)
        x_HBNL = -b_HBNL

    last_HBN = x_HBNL[..., -1]
    sources_HBS = torch.cat([m_HB[..., None].double(), chunk_HBN.double() + last_HBN.double()], -1)
    decay_HBPS = (between_HBPS + sources_HBS[..., None, :]).sub_(m_HBP[..., None]).exp_().masked_fill_(apart_PS, 0.0)
    query_HBNL = (m_HBP[..., :-1, None] - x_HBNL).clamp_max_(0.0).exp_()
    key_HBNL = (c_HBNL - last_HBN[..., None]).clamp_max_(0.0).exp_()
    if resets_BNL is not None:
        query_HBNL, key_HBNL = query_HBNL * before_first, key_HBNL * after_last
    return BlockGates(
        c_HBNL=c_HBNL,
        x_HBNL=x_HBNL,
        query_HBNL=query_HBNL,
        key_HBNL=key_HBNL,
        bound_HBNL=(-b_HBNL - x_HBNL).exp_(),
        decay_HBPS=decay_HBPS.to(m_HB.dtype),
        m_HB=m_HBP[..., -1],
        same_segment_BNLL=same_segment_BNLL,
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
