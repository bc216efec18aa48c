"""One entry for the sLSTM cell: checks what it is given and picks the fastest backend that can compute it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selfcheck import asked_once, slstm_inputs, some_resets, what_is_wrong
from xlstm_lm.ops.slstm.compiled import slstm_compiled
from xlstm_lm.ops.slstm.fused import LOOPS, loops_of, slstm_fused
from xlstm_lm.ops.slstm.recurrence import SLSTMState, slstm_recurrence


def _run_fused(
    backend: str, wx: torch.Tensor, *others: torch.Tensor, **options: object
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    problem = why_not(backend, wx.device, wx.dtype, wx.shape[-1])
    if problem is not None:
        raise ValueError(f"the sLSTM backend {backend!r} cannot compute this: {problem}; choose 'auto'")
    return slstm_fused(wx, *others, **options, backend=backend)


BACKENDS: dict[str, Callable] = {
    "recurrence": slstm_recurrence,
    "compiled": slstm_compiled,
    **{name: functools.partial(_run_fused, name) for name in LOOPS},
}
"""Every implementation by its name; all take the arguments of `slstm` but `backend`. "compiled" is for CPUs; "triton"
(where Triton is installed) and "cluster" are for GPUs, fastest first; the others run anywhere."""
if importlib.util.find_spec("triton") is None:
    del BACKENDS["triton"]


def choose_backend(wx: torch.Tensor) -> str:
    """The backend that `backend="auto"` takes for an input like `wx`.

    On a CPU "compiled", which is built on first use. On a GPU the first of "triton", "cluster" and "batched" that takes
    such heads and computes the definition there, looked at once a process. Slower ones are announced.
    """
    if torch.compiler.is_exporting():  # the program is to run where our kernels are not
        return "recurrence"
    if wx.device.type == "cpu":
        slow = "the sLSTM runs step by step in Python, which is far slower"
        return "compiled" if kernels_available(slow) else "recurrence"
    if wx.device.type == "cuda":
        B, _, _, H, D = wx.shape
        return _first_right(wx.device, wx.dtype, int(B), H, D)  # torch.compile may have made a symbol of B
    announce_once(f"no fused sLSTM kernel for {wx.device.type}: the cell takes several operations a step (`batched`)")
    return "batched"


@asked_once
def _first_right(device: torch.device, dtype: torch.dtype, B: int, H: int, D: int) -> str:
    heads, reasons = f"for heads of {D} units in {dtype} on {device}", []
    for backend in LOOPS:
        reason = why_not(backend, device, dtype, D)
        if reason is None:
            wrong = _what_is_wrong(backend, device, dtype, D, _rows(backend, B, H, D, dtype, device))
            if wrong is None:
                if backend == "batched":
                    reasons = "; ".join(reasons)
                    announce_once(
                        f"the sLSTM takes a product and a pointwise kernel a step (`batched`) {heads}: {reasons}"
                    )
                return backend
            announce_once(f"the sLSTM does without its kernels `{backend}` {heads}: {wrong}")
            reason = wrong
        reasons.append(f"`{backend}`: {reason}")
    announce_once(f"the sLSTM runs step by step in Python (`recurrence`), which is far slower, {heads}")
    return "recurrence"


@asked_once
def why_not(backend: str, device: torch.device, dtype: torch.dtype, D: int) -> str | None:
    """Why a backend of `LOOPS` cannot take heads of `D` units on a device; None if it can."""
    if backend not in BACKENDS:
        return "Triton is not installed (pip install 'xlstm-lm[gpu]')"
    return None if backend == "batched" else loops_of(backend).why_not(device, D, dtype)


def _rows(backend: str, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of the batch that a backend takes at a time; 0 where that makes no difference."""
    return 0 if backend == "batched" else loops_of(backend).rows(B, H, D, dtype, device)


@asked_once
def _what_is_wrong(backend: str, device: torch.device, dtype: torch.dtype, D: int, rows: int) -> str | None:
    """How a backend, taking so many rows at a time, differs from the definition in values or gradients; None if it does
    not.

    A compiler that gets kernels wrong on a newer GPU must not go unnoticed.
    """

    def prepare() -> tuple[Callable, Callable, list[torch.Tensor]]:
        batches = ((3 * 2**doubled, H) for doubled in range(16) for H in (2, 1))
        B, H = next(batch for batch in batches if _rows(backend, *batch, D, dtype, device) == rows)
        inputs = slstm_inputs(device, dtype, B=B, T=70 if B == 3 else 6, H=H, D=D)
        resets = some_resets(inputs)
        return *(functools.partial(slstm, resets=resets, backend=name) for name in (backend, "recurrence")), inputs

    found = what_is_wrong(prepare, device, dtype)
    return None if found is None else f"they {found[0]} ({found[1]})"


def slstm(
    wx: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor,
    *,
    resets: torch.Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    """The sLSTM cell over whole sequences: exponential input gate, sigmoid forget gate, head-wise recurrence.

    Source: arXiv 2405.04517, section 2.2. Gates come in the order i, f, z, o, all as pre-activations:

        gates_t = wx_t + einsum("bhd,ghde->bghe", y_{t-1}, r) + bias

    Args:
        wx: (B, T, 4, H, D), what the input contributes to the gates; float32, float64, bfloat16 or float16.
        r: (4, H, D, D), the recurrent weights of each gate and head.
        bias: (4, H, D).
        resets: (B, T) bool; true where the state before the step is emptied (a document starts).
        initial_state: (y, c, n, m), each (B, H, D); None is the empty state.
        return_state: also return the state after the last step.
        backend: "auto", or a name in `BACKENDS`.

    Returns:
        y (B, T, H, D) in wx's dtype; with `return_state` also (y, c, n, m), in float32 or, for float64 inputs, float64.
        Gradients reach wx, r, bias and the y, c and n of the initial state, also from the returned state. c and n
        are scaled by e^-m; m has no gradient of its own because it cancels.

    Raises:
        ValueError: a shape, dtype or device that does not fit the others, T = 0, or an unknown backend.
    """
    _check(wx, r, bias, resets, initial_state)
    if backend == "auto":
        backend = choose_backend(wx)
    elif backend == "compiled" and wx.device.type != "cpu":
        raise ValueError(f"the sLSTM backend 'compiled' takes CPU tensors, but wx is on {wx.device}; choose 'auto'")
    elif backend not in BACKENDS:
        raise ValueError(f"unknown sLSTM backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[backend](wx, r, bias, resets_BT=resets, initial_state=initial_state, return_state=return_state)


def _check(
    wx: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor,
    resets: torch.Tensor | None,
    initial_state: SLSTMState | None,
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
