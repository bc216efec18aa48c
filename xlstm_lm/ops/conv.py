"""Causal depthwise convolution over time that restarts, exactly, where a document starts.

Written as W shifted multiply-adds over blocks of rows small enough to stay in the cache: on a CPU that is
two to three times as fast, forward and backward, as a grouped `conv1d`, whose weight gradient is slow there. On a GPU
the kernel of the package causal_conv1d takes its place, where that is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from xlstm_lm.ops.selfcheck import TOLERANCE, asked_once, proves_right, some_resets

_BLOCK_ELEMENTS = 1 << 16  # of a CPU block; 256 KiB of float32, half a small core's L2 with its output


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
    """What "auto" means: "causal_conv1d" on a GPU where that package is installed, takes such a width and such weights
    and proves right, else "torch"."""
    if x_BTD.device.type == "cuda" and "causal_conv1d" in BACKENDS and x_BTD.dtype in TOLERANCE:
        return "causal_conv1d" if _causal_conv1d_is_right(x_BTD.device, x_BTD.dtype, *weight_DW.shape) else "torch"
    return "torch"


class _CausalConv(torch.autograd.Function):
    """The convolution from an empty past. `documents_BT` numbers the document of each position."""

    @staticmethod
    def forward(ctx, x_BTD, weight_DW, bias_D, documents_BT):
        ctx.save_for_backward(x_BTD, weight_DW, documents_BT)
        ctx.bias_dtype = None if bias_D is None else bias_D.dtype
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        taps_WD = weight_DW.t().to(dtype).contiguous()
        y_BTD = torch.empty_like(x_BTD, dtype=dtype, memory_format=torch.contiguous_format)
        for rows in _row_blocks(x_BTD):
            x, y, documents = x_BTD[rows].to(dtype), y_BTD[rows], _rows_of(documents_BT, rows)
            if bias_D is None:
                torch.mul(x, taps_WD[-1], out=y)
            else:
                torch.addcmul(bias_D.to(dtype), x, taps_WD[-1], out=y)
            for age, tap_D in _older_taps(taps_WD, x.shape[1]):
                y[:, age:].addcmul_(_same_document(x[:, :-age], documents, age), tap_D)
        return y_BTD.to(x_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTD):
        x_BTD, weight_DW, documents_BT = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        taps_WD = weight_DW.t().to(dtype).contiguous()
        dtaps_WD = torch.zeros_like(taps_WD)
        dx_BTD = torch.empty_like(x_BTD, dtype=dtype, memory_format=torch.contiguous_format)
        for rows in _row_blocks(x_BTD):
            x, dy, dx = x_BTD[rows].to(dtype), dy_BTD[rows].to(dtype), dx_BTD[rows]
            documents = _rows_of(documents_BT, rows)
            torch.mul(dy, taps_WD[-1], out=dx)
            if needs_weight:
                dtaps_WD[-1] += (dy * x).sum((0, 1))
            for age, tap_D in _older_taps(taps_WD, x.shape[1]):
                dy_of_document = _same_document(dy[:, age:], documents, age)
                dx[:, :-age].addcmul_(dy_of_document, tap_D)
                if needs_weight:
                    dtaps_WD[-1 - age] += (dy_of_document * x[:, :-age]).sum((0, 1))
        return (
            dx_BTD.to(x_BTD.dtype) if needs_x else None,
            dtaps_WD.t().to(weight_DW.dtype) if needs_weight else None,
            dy_BTD.sum((0, 1), dtype=dtype).to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


def _row_blocks(x_BTD: torch.Tensor) -> list[slice]:
    """Slices of the batch: on a CPU such that a block stays in the cache, elsewhere one."""
    B, T, D = x_BTD.shape
    rows = max(1, _BLOCK_ELEMENTS // (T * D)) if x_BTD.device.type == "cpu" else B
    return [slice(start, start + rows) for start in range(0, B, rows)]


def _rows_of(documents_BT: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if documents_BT is None else documents_BT[rows]


def _older_taps(taps_WD: torch.Tensor, length: int) -> list[tuple[int, torch.Tensor]]:
    """(age, weights) of every tap but the newest that reaches back to an input at all."""
    return [(age, taps_WD[-1 - age]) for age in range(1, min(taps_WD.shape[0], length))]


def _same_document(values: torch.Tensor, documents: torch.Tensor | None, age: int) -> torch.Tensor:
    """`values` of the pairs (t - age, t), zero where the two lie in different documents."""
    if documents is None:
        return values
    return values * (documents[:, :-age] == documents[:, age:]).to(values.dtype)[:, :, None]


@torch.compiler.disable  # torch.compile cannot look into the package
def _causal_conv1d(
    x_BTD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None, documents_BT: torch.Tensor | None
) -> torch.Tensor:
    """By the package causal_conv1d, which knows documents where the channels lie side by side."""
    # Not an import: this file goes with exports, and transformers refuses code whose imports are not installed.
    kernel = importlib.import_module("causal_conv1d").causal_conv1d_fn
    stride_B, stride_T, stride_D = x_BTD.stride()
    if stride_D != 1 or any(each % 8 for each in (stride_B, stride_T, x_BTD.storage_offset())):
        x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)  # it reads eight channels at once
    bias_D = None if bias_D is None else bias_D.to(weight_DW.dtype)
    documents_BT = None if documents_BT is None else documents_BT.to(torch.int32)
    return kernel(x_BTD.transpose(1, 2), weight_DW, bias_D, seq_idx=documents_BT).transpose(1, 2)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"torch": _CausalConv.apply}
"""The convolution from an empty past by name: the definition and, where the package causal_conv1d is installed, its
kernel for a GPU."""
if importlib.util.find_spec("causal_conv1d") is not None:
    BACKENDS["causal_conv1d"] = _causal_conv1d


@asked_once
def _causal_conv1d_is_right(device: torch.device, dtype: torch.dtype, D: int, W: int) -> bool:
    """Whether causal_conv1d's kernel computes the definition on this device, values and gradients; if not, says so."""

    def prepare() -> tuple[Callable, Callable, list[torch.Tensor]]:
        inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in ((2, 70, D), (D, W), (D,))]
        run = functools.partial(causal_conv, resets_BT=some_resets(inputs))
        return *(functools.partial(run, backend=name) for name in ("causal_conv1d", "torch")), inputs

    sizes, instead = f", {D} channels, {W} taps", "the convolution runs in PyTorch (`torch`), which is slower"
    return proves_right(prepare, device, dtype, kernel="causal_conv1d's kernel", sizes=sizes, instead=instead)


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
