"""The sLSTM cell in the variables of its reverse loops.

With h = c / n, the log normalizer s = m + log n, and p = input / n, the share of the new in the cell,

    p_t = sigmoid(i_t - logsigmoid(f_t) - s_{t-1})
    s_t = logsigmoid(f_t) + s_{t-1} - log(1 - p_t)
    h_t = (1 - p_t) h_{t-1} + p_t tanh(z_t)            y_t = sigmoid(o_t) h_t

In these variables, few numbers are kept of each step, all of them bounded and none a stabilizer, and the gradients are
sums of a few products. c and n are related to h and s where a sequence ends, and where it begins.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """The numbers of the forward loop that a reverse loop needs."""

    values_BTVHD: Tensor
    """Numbers of each step: sigmoid(o), p, tanh(z), h before it, sigmoid(-f) (-1 for a reset, where it is not
    used), and the gradient of y; in memory H, B, T, V, D."""
    ends_SBHD: Tensor
    """c and n after the last step; and the forget weight of the first step over n after it."""


def into_shares(dlast: tuple[Tensor, Tensor, Tensor], kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, h, s after the last step, (B, H, D) each, from those of y, c, n."""
    dy_BHD, dc_BHD, dn_BHD = dlast
    c_BHD, n_BHD, _ = kept.ends_SBHD
    return dy_BHD, dc_BHD * n_BHD, dc_BHD * c_BHD + dn_BHD * n_BHD


def from_shares(dy_BHD: Tensor, dh_BHD: Tensor, ds_BHD: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, c, n before the first step from those of y before it and of h and s after it.

    (Before it there may be no h and s: n may be 0.)
    """
    _, share_BHD, squashed_BHD, h_BHD, *_ = kept.values_BTVHD[:, 0].unbind(1)
    h_BHD = h_BHD + share_BHD * (squashed_BHD - h_BHD)
    weight_BHD = kept.ends_SBHD[2]
    return dy_BHD.contiguous(), weight_BHD * dh_BHD, weight_BHD * (ds_BHD - h_BHD * dh_BHD)
