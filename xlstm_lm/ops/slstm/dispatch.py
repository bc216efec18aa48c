"""The sLSTM's entry for the rest of the package: it checks its arguments and picks a backend."""

from __future__ import annotations

from typing import Any

import torch

from xlstm_lm.ops.slstm.operation import SLSTM
from xlstm_lm.ops.slstm.recurrence import SLSTMState


def slstm(
    wx: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor,
    *,
    resets: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    """The sLSTM cell over whole sequences: exponential input gate, sigmoid forget gate, head-wise recurrence.

    Source: arXiv 2405.04517, section 2.2. Gates come in the order i, f, z, o, all as pre-activations:

        gates_t = wx_t + einsum("bhd,ghde->bghe", y_{t-1}, r) + bias

    Args:
        wx: (B, T, 4, H, D), the input's contribution to the gates; float32, float64, bfloat16 or float16.
        r: (4, H, D, D), the recurrent weights of each gate and head.
        bias: (4, H, D).
        resets: (B, T) bool; true where the state before the step is emptied (a document starts); None for no resets.
        initial_state: (y, c, n, m), each (B, H, D); None is the empty state.
        return_state: also return the state after the last step.
        backend: "auto", or the name of a backend of `SLSTM`.

    Returns:
        y (B, T, H, D) in wx's dtype; with `return_state` also (y, c, n, m), in float32 or, for float64 inputs, float64.
        Gradients reach wx, r, bias and the y, c and n of the initial state, also from the returned state. c and n
        are scaled by e^-m; m has no gradient of its own because it cancels.

    Raises:
        ValueError: a shape, dtype or device that does not fit the others, T = 0, or an unknown backend.
    """
    _check(wx, r, bias, resets, initial_state)
    sizes: dict[str, Any] = {"D": wx.shape[-1]}
    if wx.device.type == "cuda":
        sizes |= {"B": wx.shape[0], "H": wx.shape[3]}
    inputs = (wx, r, bias, *(initial_state or ()))
    chosen = SLSTM.backend_for(inputs, backend, has_resets=resets is not None, **sizes)
    return chosen.loaded(wx, r, bias, resets_BT=resets, initial_state=initial_state, return_state=return_state)


def _check(
    wx: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor,
    resets: torch.Tensor | None,
    initial_state: tuple[torch.Tensor, ...] | None,
) -> None:
    if wx.ndim != 5 or wx.shape[2] != 4:
        raise ValueError(
            f"wx has shape {tuple(wx.shape)}; expected (B, T, 4, H, D) with the gates i, f, z, o in that order"
        )
    if not wx.is_floating_point():
        raise ValueError(f"wx is {wx.dtype}; expected a floating-point dtype")
    B, T, _, H, D = wx.shape
    if wx.numel() == 0:
        raise ValueError(f"wx has shape {tuple(wx.shape)}, which holds nothing; B, T, H and D must be at least 1")
    expected = {"r": (r, (4, H, D, D)), "bias": (bias, (4, H, D))}
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(f"resets is {resets.dtype}; expected torch.bool, true where a document starts")
        expected["resets"] = (resets, (B, T))
    if initial_state is not None:
        if len(initial_state) != 4:
            raise ValueError(f"initial_state has {len(initial_state)} tensors; expected the four (y, c, n, m)")
        for name, part in zip("ycnm", initial_state, strict=True):
            expected[f"initial_state {name}"] = (part, (B, H, D))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} to go with wx {tuple(wx.shape)}"
            )
        if tensor.device != wx.device:
            raise ValueError(f"{name} is on {tensor.device} but wx on {wx.device}; move them to one device")
