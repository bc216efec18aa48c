"""The parts of the sLSTM that need no recurrence, as operators of PyTorch around loops that run over time in one go.

A backend is a module with the functions of `Loops`. The remaining large matrix products are here, once for all
backends: the gate pre-activations of all steps, which the backward computes again from y, and the gradients of R and
the bias. As operators of the dispatcher the passes stay whole under torch.compile and in activation checkpointing.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import custom_operator, without_autocast
from xlstm_lm.ops.slstm.recurrence import SLSTMState, compute_dtype, empty_state

CHECKPOINT_STEPS = 64
"""Steps from one checkpoint of c, n and m to the next."""


class Loops(Protocol):
    """The two loops of a backend, a module, and its limits.

    All tensors are on one device. "state type" is float32, or float64 for inputs in float64; R has the inputs' type. In
    16-bit types the y in the next step's recurrent product is the rounded one that is stored: the backward rebuilds the
    same gates from it.
    """

    def why_not(self, device: torch.device, D: int, dtype: torch.dtype) -> str | None:
        """The reason why heads of D units cannot be computed there; None if they can."""

    def rows(self, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> int:
        """Rows of the batch computed at a time; other numbers of rows run other compiled code."""

    def forward_loop(
        self, wx_BTGHD: Tensor, r_GHDE: Tensor, bias_GHD: Tensor, resets_BT: Tensor | None, state: SLSTMState
    ) -> tuple[Tensor, Tensor, SLSTMState]:
        """y, checkpoints and the last state.

        Args:
            wx_BTGHD: (B, T, 4, H, D), gates i, f, z, o; any strides, the last of them 1.
            r_GHDE: (4, H, D, D), contiguous: gates_t[g] = wx_t[g] + einsum("bhd,hde->bhe", y_{t-1}, r[g]) + bias[g].
            bias_GHD: (4, H, D), state type, contiguous.
            resets_BT: (B, T) bool, contiguous, or None.
            state: y, c, n, m before the first step, each (B, H, D), state type, contiguous. m may be -inf.

        Returns:
            y (B, T, H, D), contiguous, in wx's type; checkpoints (N, 3, B, H, D), state type, contiguous: c, n and m
            before steps 0, 64, 128 .. (before a reset at that very step takes effect), N = ceil(T / 64); y, c, n, m
            after the last step, each (B, H, D), state type, y as rounded as the stored one.
        """

    def backward_loop(
        self,
        gates_BTGHD: Tensor,
        r_GHDE: Tensor,
        dy_BTHD: Tensor,
        checkpoints_NSBHD: Tensor,
        resets_BT: Tensor | None,
        dlast: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Gradients of the gates of all steps, and of y, c, n before the first step.

        Args:
            gates_BTGHD: (B, T, 4, H, D), pre-activations in the state type; in memory H, B, T, 4, D.
            r_GHDE, checkpoints_NSBHD, resets_BT: as in the forward loop.
            dy_BTHD: (B, T, H, D) in the inputs' type; any strides, the last of them 1.
            dlast: gradients of y, c, n after the last step, each (B, H, D), state type, contiguous.

        Returns:
            dgates (B, T, 4, H, D) in the inputs' type and the layout of `gates_BTGHD` (`torch.empty_like` keeps it);
            dy, dc, dn before the first step, each (B, H, D), state type, contiguous.
        """


LOOPS = {
    "triton": "xlstm_lm.ops.slstm.triton_loops",
    "cluster": "xlstm_lm.ops.slstm.cluster",
    "batched": "xlstm_lm.ops.slstm.batched",
}
"""The modules with the loops, fastest first. They are imported at first use: not every machine can import all."""


def loops_of(backend: str) -> Loops:
    """The module of a backend in `LOOPS`."""
    return importlib.import_module(LOOPS[backend])


def slstm_fused(
    wx_BTGHD: Tensor,
    r_GHDE: Tensor,
    bias_GHD: Tensor,
    *,
    resets_BT: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    backend: str,
) -> Tensor | tuple[Tensor, SLSTMState]:
    """The cell of `slstm_recurrence`, same arguments and results, by the loops of a backend in `LOOPS`.

    R is rounded to wx's type, the type of the recurrent product's factors; its sums have the state type. Differentiable
    once.
    """
    dtype = compute_dtype(wx_BTGHD.dtype)
    state = empty_state(wx_BTGHD) if initial_state is None else initial_state
    y_BHD, c_BHD, n_BHD, m_BHD = (part.to(dtype) for part in state)
    y_BTHD, _, *last = forward(
        wx_BTGHD, r_GHDE, bias_GHD.to(dtype), resets_BT, y_BHD, c_BHD, n_BHD, m_BHD.detach(), backend
    )
    return (y_BTHD, (*last[:3], last[3].detach())) if return_state else y_BTHD


def compute_forward(
    wx: Tensor,
    r: Tensor,
    bias: Tensor,
    resets: Tensor | None,
    y: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y of all steps, checkpoints, and y, c, n, m after the last step."""
    # Triton launches on the current device; products are taken in the types that they are given.
    with torch.cuda.device_of(wx), without_autocast(wx):
        y_BTHD, checkpoints_NSBHD, last = loops_of(backend).forward_loop(
            _last_dense(wx),
            r.to(wx.dtype).contiguous(),
            bias.contiguous(),
            None if resets is None else resets.contiguous(),
            (y.contiguous(), c.contiguous(), n.contiguous(), m.contiguous()),
        )
        return y_BTHD, checkpoints_NSBHD, *last


def _forward_shapes(
    wx: Tensor, r: Tensor, bias: Tensor, resets: Tensor | None, y: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    B, T, _, H, D = wx.shape
    checkpoints_NSBHD = y.new_empty(-(-T // CHECKPOINT_STEPS), 3, B, H, D)
    return wx.new_empty(B, T, H, D), checkpoints_NSBHD, *(y.new_empty(B, H, D) for _ in range(4))


def compute_backward(
    wx: Tensor,
    r: Tensor,
    bias: Tensor,
    resets: Tensor | None,
    y_first: Tensor,
    y: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    dy_last: Tensor,
    dc_last: Tensor,
    dn_last: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of wx, R, the bias, and of y, c, n before the first step."""
    # Triton launches on the current device; products are taken in the types that they are given.
    with torch.cuda.device_of(wx), without_autocast(wx):
        B, T, G, H, D = wx.shape
        dtype = bias.dtype
        r_GHDE = r.to(wx.dtype).contiguous()
        before_HBTD = wx.new_empty(H, B, T, D)  # the y that goes into each step's recurrent product
        before_HBTD[:, :, 0] = y_first.transpose(0, 1)
        before_HBTD[:, :, 1:] = y[:, :-1].permute(2, 0, 1, 3)
        if resets is not None:
            before_HBTD.masked_fill_(resets[..., None], 0.0)

        gates_HBTGD = torch.empty(H, B, T, G, D, dtype=dtype, device=wx.device)
        torch.add(wx.permute(3, 0, 1, 2, 4), bias.transpose(0, 1)[:, None, None], out=gates_HBTGD)
        product(
            before_HBTD.view(H, B * T, D),
            r_GHDE.permute(1, 2, 0, 3).reshape(H, D, G * D),
            sums=gates_HBTGD.view(H, B * T, G * D),
        )

        dgates_BTGHD, dfirst = loops_of(backend).backward_loop(
            gates_HBTGD.permute(1, 2, 3, 0, 4),
            r_GHDE,
            _last_dense(dy),
            checkpoints,
            None if resets is None else resets.contiguous(),
            (dy_last.contiguous(), dc_last.contiguous(), dn_last.contiguous()),
        )
        del gates_HBTGD
        dgates_HRE = dgates_BTGHD.permute(3, 0, 1, 2, 4).view(H, B * T, G * D)
        dr_HDGE = product(before_HBTD.view(H, B * T, D).mT, dgates_HRE).view(H, D, G, D)
        dbias_HGD = dgates_HRE.sum(1, dtype=dtype).view(H, G, D)
        dr_GHDE = dr_HDGE.permute(2, 0, 1, 3).to(r.dtype, memory_format=torch.contiguous_format, copy=True)
        return dgates_BTGHD, dr_GHDE, dbias_HGD.transpose(0, 1).contiguous(), *dfirst


def _backward_shapes(
    wx: Tensor, r: Tensor, bias: Tensor, resets: Tensor | None, y_first: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    B, T, G, H, D = wx.shape
    dwx_BTGHD = wx.new_empty(H, B, T, G, D).permute(1, 2, 3, 0, 4)
    dstate = (torch.empty_like(y_first, memory_format=torch.contiguous_format) for _ in range(3))
    return dwx_BTGHD, r.new_empty(r.shape), bias.new_empty(bias.shape), *dstate


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def product(a: Tensor, b: Tensor, sums: Tensor | None = None) -> Tensor:
    """a @ b, batched, added to `sums` in place if given. 16-bit factors are multiplied exactly, summed in float32."""
    if a.dtype.itemsize == 2:
        if a.is_cuda and torch.version.hip is None:
            if sums is None:
                return torch.bmm(a, b, out_dtype=torch.float32)
            return torch.baddbmm(sums, a, b, out_dtype=torch.float32, out=sums)
        a, b = a.float(), b.float()
    return torch.bmm(a, b) if sums is None else sums.baddbmm_(a, b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    wx, r, bias, resets, y_first, *_, backend = inputs
    ctx.save_for_backward(wx, r, bias, resets, y_first, *output[:2])
    ctx.backend = backend
    ctx.mark_non_differentiable(output[1], output[5])


def _gradients(ctx: Any, dy: Tensor, _: Any, *dlast: Tensor) -> tuple[Tensor | None, ...]:
    dwx, dr, dbias, *dfirst = backward(*ctx.saved_tensors, dy, *dlast[:3], ctx.backend)
    return dwx, dr, dbias, None, *dfirst, None, None


backward = custom_operator("slstm_fused_backward", compute_backward, _backward_shapes)
forward = custom_operator("slstm_fused", compute_forward, _forward_shapes, gradients=_gradients, keep=_keep)
