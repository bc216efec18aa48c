"""Causal depthwise convolution over time that restarts, exactly, where a document starts: one entry, which picks the
fastest form there is."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from xlstm_lm.ops.conv.causal_conv1d import conv_causal_conv1d
from xlstm_lm.ops.conv.compiled import conv_compiled
from xlstm_lm.ops.conv.shifts import conv_shifts
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selfcheck import TOLERANCE, asked_once, proves_right, some_resets

BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"torch": conv_shifts, "compiled": conv_compiled}
"""The convolution from an empty past by name: the definition in PyTorch, a compiled form for the CPU and, where the
package causal_conv1d is installed, its kernel for a GPU."""
if importlib.util.find_spec("causal_conv1d") is not None:
    BACKENDS["causal_conv1d"] = conv_causal_conv1d
SLOW = "the convolution runs in PyTorch (`torch`), which is slower"


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    resets_BT: torch.Tensor | None = None,
    initial_state_BWD: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}, each channel for itself, over the inputs of t's own document.

    This is the convolution in front of the cells' gates (arXiv 2405.04517, figures 10 and 11). The newest input meets
    the last weight, as in `torch.nn.Conv1d(groups=D)` with W - 1 zeros on the left.

    Args:
        x_BTD: (B, T, D).
        weight_DW: (D, W).
        bias_D: (D,) or None.
        resets_BT: (B, T) bool; true where a document starts: nothing before it is seen from there on.
        initial_state_BWD: (B, W - 1, D), the inputs before the first, oldest first; None means zeros.
        return_state: also return such a state for what follows, with what precedes the last reset set to zero.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, D) in x's dtype and, with `return_state`, the state (B, W - 1, D). Half precisions are summed in
        float32. Gradients reach x, weight, bias and the initial state, also from the returned state.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
    """
    _check(x_BTD, weight_DW, bias_D, resets_BT, initial_state_BWD)
    if backend == "auto":
        backend = choose_backend(x_BTD, weight_DW)
    elif backend not in BACKENDS:
        raise ValueError(
            f"unknown convolution backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    past = weight_DW.shape[1] - 1
    extended_BTD = x_BTD
    if initial_state_BWD is not None:
        extended_BTD = torch.cat((initial_state_BWD.to(x_BTD.dtype), x_BTD), dim=1)
        resets_BT = None if resets_BT is None else pad(resets_BT, (past, 0))
    documents_BT = None if resets_BT is None else resets_BT.cumsum(1)

    y_BTD = BACKENDS[backend](extended_BTD, weight_DW, bias_D, documents_BT)
    if initial_state_BWD is not None:
        y_BTD = y_BTD[:, past:]
    if not return_state:
        return y_BTD

    first = extended_BTD.shape[1] - past
    state_BWD = extended_BTD[:, max(first, 0) :]
    if documents_BT is not None:
        of_last_document_BW = documents_BT[:, max(first, 0) :] == documents_BT[:, -1:]
        state_BWD = torch.where(of_last_document_BW[:, :, None], state_BWD, 0.0)
    return y_BTD, pad(state_BWD, (0, 0, max(-first, 0), 0))


def choose_backend(x_BTD: torch.Tensor, weight_DW: torch.Tensor) -> str:
    """What "auto" means: "compiled" on a CPU, which is built on first use; "causal_conv1d" on a GPU where that package
    is installed; each where it takes such a width and such weights and proves right, else "torch"."""
    device, dtype, backend = x_BTD.device, x_BTD.dtype, "torch"
    if torch.compiler.is_exporting():  # the program is to run where our kernels are not
        return backend
    if device.type == "cpu" and kernels_available(SLOW):
        backend = "compiled"
    elif device.type == "cuda" and "causal_conv1d" in BACKENDS and dtype in TOLERANCE:
        backend = "causal_conv1d"
    return backend if backend == "torch" or _is_right(backend, device, dtype, *weight_DW.shape) else "torch"


@asked_once
def _is_right(backend: str, device: torch.device, dtype: torch.dtype, D: int, W: int) -> bool:
    """Whether a kernel computes the definition on this device, values and gradients; if not, says so."""

    def prepare() -> tuple[Callable, Callable, list[torch.Tensor]]:
        inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in ((2, 70, D), (D, W), (D,))]
        run = functools.partial(causal_conv, resets_BT=some_resets(inputs))
        return *(functools.partial(run, backend=name) for name in (backend, "torch")), inputs

    kernel, sizes = f"the kernels of the convolution {backend!r}", f", {D} channels, {W} taps"
    return proves_right(prepare, device, dtype, kernel=kernel, sizes=sizes, instead=SLOW)


def _check(x_BTD, weight_DW, bias_D, resets_BT, initial_state_BWD) -> None:
    if x_BTD.ndim != 3 or x_BTD.numel() == 0:
        raise ValueError(f"x has shape {tuple(x_BTD.shape)}; expected (B, T, D), each at least 1")
    B, T, D = x_BTD.shape
    if weight_DW.ndim != 2 or weight_DW.shape[0] != D or weight_DW.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight_DW.shape)}; expected (D, W) with D = {D}, the width of x")
    past = weight_DW.shape[1] - 1
    if bias_D is not None and bias_D.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias_D.shape)}; expected ({D},), the width of x")
    if resets_BT is not None and (resets_BT.shape != (B, T) or resets_BT.dtype != torch.bool):
        raise ValueError(
            f"resets is {resets_BT.dtype} of shape {tuple(resets_BT.shape)}; expected torch.bool of shape {(B, T)}, "
            "true where a document starts"
        )
    if initial_state_BWD is not None and initial_state_BWD.shape != (B, past, D):
        raise ValueError(
            f"initial_state has shape {tuple(initial_state_BWD.shape)}; expected {(B, past, D)}, "
            f"the {past} inputs that a width of {past + 1} looks back on"
        )
