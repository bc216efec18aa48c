"""The sLSTM's loops as a batched matrix product and a pointwise kernel a step: any device, any size, any float type.

On a GPU 64 steps are captured in a CUDA graph and the pointwise part is one Triton kernel (plain operations where there
is no Triton). On a CPU it is the fused loops in readable form.

The reverse loop looks at the cell in other variables, which leaves few and bounded numbers to keep for each step: with
h = c / n, log normalizer s = m + log n, and p = input / n, the share of the new in the cell,

    p_t = sigmoid(i - logsigmoid(f) - s_{t-1})    h_t = (1 - p_t) h_{t-1} + p_t tanh(z)    y_t = sigmoid(o) h_t
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_lm.ops.slstm import cuda_graphs
from xlstm_lm.ops.slstm.fused import CHECKPOINT_STEPS, product
from xlstm_lm.ops.slstm.recurrence import SLSTMState
from xlstm_lm.ops.slstm.shares import Kept, from_shares, into_shares


def why_not(device: torch.device, D: int, dtype: torch.dtype) -> None:
    """None: it computes everything."""


def rows(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> int:
    """One number for all batches, which run the same code."""
    return 1


def forward_loop(
    wx_BTGHD: Tensor, r_GHDE: Tensor, bias_GHD: Tensor, resets_BT: Tensor | None, state: SLSTMState
) -> tuple[Tensor, Tensor, SLSTMState]:
    """See `fused.Loops`."""
    B, T, G, H, D = wx_BTGHD.shape
    r_HDE = r_GHDE.permute(1, 2, 0, 3).reshape(H, D, G * D)
    y_BTHD = wx_BTGHD.new_empty(B, T, H, D)
    checkpoints_NSBHD = bias_GHD.new_empty(-(-T // CHECKPOINT_STEPS), 3, B, H, D)
    y_BHD, c_BHD, n_BHD, m_BHD = (part.clone() for part in state)
    y_BHD.copy_(y_BHD.to(y_BTHD.dtype))
    for checkpoint_SBHD, start in zip(checkpoints_NSBHD, range(0, T, CHECKPOINT_STEPS), strict=True):
        torch.stack((c_BHD, n_BHD, m_BHD), out=checkpoint_SBHD)
        steps = slice(start, start + CHECKPOINT_STEPS)
        resets_BS = None if resets_BT is None else resets_BT[:, steps]
        cuda_graphs.run(
            _forward_segment,
            inputs=(wx_BTGHD[:, steps], r_HDE, bias_GHD, resets_BS),
            outputs=(y_BTHD[:, steps], y_BHD, c_BHD, n_BHD, m_BHD),
            capture=start + CHECKPOINT_STEPS <= T,
        )
    return y_BTHD, checkpoints_NSBHD, (y_BHD, c_BHD, n_BHD, m_BHD)


def _forward_segment(
    wx_BTGHD: Tensor, r_HDE: Tensor, bias_GHD: Tensor, resets_BT: Tensor | None, y_BTHD: Tensor, *state: Tensor
) -> None:
    """Compute some steps: fill y and advance the state in place."""
    kernels = _triton_kernels(wx_BTGHD)
    y_HBD = state[0].transpose(0, 1).to(wx_BTGHD.dtype).contiguous()
    for t, wx_BGHD in enumerate(wx_BTGHD.unbind(1)):
        product_BGHD = product(y_HBD, r_HDE).unflatten(-1, (4, -1)).permute(1, 2, 0, 3)
        reset_B = None if resets_BT is None else resets_BT[:, t]
        if kernels:
            kernels.forward_step(product_BGHD, wx_BGHD, bias_GHD, reset_B, y_BTHD[:, t], y_HBD, state[1:])
            continue
        if reset_B is not None:
            product_BGHD = product_BGHD.masked_fill(reset_B[:, None, None, None], 0.0)
        cell = advance(product_BGHD + wx_BGHD + bias_GHD, reset_B, *state[1:])
        y_BTHD[:, t] = torch.sigmoid(cell.output_BHD) * cell.c_BHD / cell.n_BHD
        y_HBD.copy_(y_BTHD[:, t].transpose(0, 1))
        for part, new in zip(state[1:], cell, strict=False):
            part.copy_(new)
    state[0].copy_(y_HBD.transpose(0, 1))


class Cell(NamedTuple):
    """A step of the cell: the state after it, and the numbers that the reverse loop uses."""

    c_BHD: Tensor
    n_BHD: Tensor
    m_BHD: Tensor
    input_BHD: Tensor
    forget_BHD: Tensor
    squashed_BHD: Tensor
    output_BHD: Tensor


def advance(gates_BGHD: Tensor, reset_B: Tensor | None, c_BHD: Tensor, n_BHD: Tensor, m_BHD: Tensor) -> Cell:
    """The step of `slstm_recurrence` from pre-activations of the gates; that of the output gate is passed through."""
    if reset_B is not None:
        reset_B11 = reset_B[:, None, None]
        c_BHD, n_BHD = c_BHD.masked_fill(reset_B11, 0.0), n_BHD.masked_fill(reset_B11, 0.0)
        m_BHD = m_BHD.masked_fill(reset_B11, -torch.inf)
    i_BHD, f_BHD, z_BHD, o_BHD = gates_BGHD.unbind(1)
    decayed_BHD = logsigmoid(f_BHD) + m_BHD
    m_BHD = torch.maximum(i_BHD, decayed_BHD)
    input_BHD, forget_BHD = torch.exp(i_BHD - m_BHD), torch.exp(decayed_BHD - m_BHD)
    squashed_BHD = torch.tanh(z_BHD)
    c_BHD, n_BHD = forget_BHD * c_BHD + input_BHD * squashed_BHD, forget_BHD * n_BHD + input_BHD
    return Cell(c_BHD, n_BHD, m_BHD, input_BHD, forget_BHD, squashed_BHD, o_BHD)


def rebuild(gates_BTGHD: Tensor, dy_BTHD: Tensor, checkpoints_NSBHD: Tensor, resets_BT: Tensor | None) -> Kept:
    """Run the cell again from every checkpoint. The gates include the recurrent products."""
    kernels = _triton_kernels(gates_BTGHD)
    if kernels:
        return kernels.rebuild(gates_BTGHD, dy_BTHD, checkpoints_NSBHD, resets_BT)
    B, T, _, H, D = gates_BTGHD.shape
    values_BTVHD = gates_BTGHD.new_empty(H, B, T, 6, D).permute(1, 2, 3, 0, 4)
    ends_SBHD = gates_BTGHD.new_empty(3, B, H, D)
    for start, checkpoint_SBHD in zip(range(0, T, CHECKPOINT_STEPS), checkpoints_NSBHD.unbind(0), strict=True):
        c_BHD, n_BHD, m_BHD = checkpoint_SBHD.unbind(0)
        for t in range(start, min(start + CHECKPOINT_STEPS, T)):
            reset_B = None if resets_BT is None else resets_BT[:, t]
            cell = advance(gates_BTGHD[:, t], reset_B, c_BHD, n_BHD, m_BHD)
            kept_BHD = cell.forget_BHD
            h_BHD = (c_BHD / n_BHD).masked_fill(n_BHD == 0, 0.0)
            share_BHD = cell.input_BHD / cell.n_BHD
            closed_BHD = torch.sigmoid(-gates_BTGHD[:, t, 1])
            if reset_B is not None:
                reset_B11 = reset_B[:, None, None]
                kept_BHD, h_BHD = kept_BHD.masked_fill(reset_B11, 0.0), h_BHD.masked_fill(reset_B11, 0.0)
                share_BHD, closed_BHD = share_BHD.masked_fill(reset_B11, 1.0), closed_BHD.masked_fill(reset_B11, -1.0)
            output_BHD = torch.sigmoid(cell.output_BHD)
            values = (output_BHD, share_BHD, cell.squashed_BHD, h_BHD, closed_BHD, dy_BTHD[:, t].to(h_BHD.dtype))
            torch.stack(values, 1, out=values_BTVHD[:, t])
            if t == 0:
                ends_SBHD[2] = kept_BHD / cell.n_BHD
            c_BHD, n_BHD, m_BHD = cell[:3]
    ends_SBHD[0], ends_SBHD[1] = c_BHD, n_BHD
    return Kept(values_BTVHD, ends_SBHD)


def backward_loop(
    gates_BTGHD: Tensor,
    r_GHDE: Tensor,
    dy_BTHD: Tensor,
    checkpoints_NSBHD: Tensor,
    resets_BT: Tensor | None,
    dlast: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See `fused.Loops`."""
    _, T, G, H, D = gates_BTGHD.shape
    r_HED = r_GHDE.permute(1, 0, 3, 2).reshape(H, G * D, D)
    kept = rebuild(gates_BTGHD, dy_BTHD, checkpoints_NSBHD, resets_BT)
    dgates_BTGHD = torch.empty_like(gates_BTGHD, dtype=dy_BTHD.dtype)
    dy_BHD, dh_BHD, ds_BHD = into_shares(dlast, kept)
    dy_HBD = dy_BHD.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    dstate = (dy_HBD, dh_BHD, ds_BHD, torch.empty_like(dh_BHD), torch.empty_like(ds_BHD))
    for start in reversed(range(0, T, CHECKPOINT_STEPS)):
        steps = slice(start, start + CHECKPOINT_STEPS)
        cuda_graphs.run(
            _backward_segment,
            inputs=(kept.values_BTVHD[:, steps], r_HED),
            outputs=(dgates_BTGHD[:, steps], *dstate),
            capture=start + CHECKPOINT_STEPS <= T,
        )
    return dgates_BTGHD, from_shares(dy_HBD.transpose(0, 1), *dstate[3:], kept)


def _backward_segment(values_BTVHD: Tensor, r_HED: Tensor, dgates_BTGHD: Tensor, *dstate: Tensor) -> None:
    """Compute some steps, last to first: fill dgates and update in place the gradients of y (H, B, D), h and s before a
    step and, the last two of `dstate`, those of h and s after it."""
    kernels = _triton_kernels(values_BTVHD)
    B, T, _, H, D = values_BTVHD.shape
    factor_HBGD = dgates_BTGHD.new_empty(H, B, 4, D)  # of dgates, the part that reaches the step before
    carried_dy_HBD, dh_BHD, ds_BHD, dh_after_BHD, ds_after_BHD = dstate
    for t in reversed(range(T)):
        if kernels:
            kernels.backward_step(values_BTVHD[:, t], dgates_BTGHD[:, t], factor_HBGD, dstate)
        else:
            output_BHD, share_BHD, squashed_BHD, h_BHD, closed_BHD, dy_BHD = values_BTVHD[:, t].unbind(1)
            dy_BHD = dy_BHD + carried_dy_HBD.transpose(0, 1)
            dh_after_BHD.copy_(dh_BHD + dy_BHD * output_BHD)
            ds_after_BHD.copy_(ds_BHD)
            news_BHD, left_BHD = share_BHD * (squashed_BHD - h_BHD), 1 - share_BHD
            di_BHD = dh_after_BHD * news_BHD * left_BHD + ds_after_BHD * share_BHD
            ds_BHD.sub_(di_BHD)
            dz_BHD = dh_after_BHD * share_BHD * (1 - squashed_BHD * squashed_BHD)
            do_BHD = dy_BHD * (h_BHD + news_BHD) * output_BHD * (1 - output_BHD)
            torch.mul(dh_after_BHD, left_BHD, out=dh_BHD)
            dgates_BGHD = torch.stack((di_BHD, ds_BHD * closed_BHD, dz_BHD, do_BHD), 1)
            dgates_BTGHD[:, t] = dgates_BGHD
            factor_HBGD.copy_(dgates_BGHD.masked_fill(closed_BHD[:, None] < 0, 0.0).permute(2, 0, 1, 3))
        carried_dy_HBD.copy_(product(factor_HBGD.flatten(2), r_HED))


def _triton_kernels(x: Tensor) -> ModuleType | None:
    """The pointwise kernels in Triton where they run: on a GPU, in any type but float64."""
    if not x.is_cuda or x.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    from xlstm_lm.ops.slstm import triton_pointwise

    return triton_pointwise
