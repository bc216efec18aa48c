"""Shapes and gradients of the C++ operators, which make each of them one node for torch.compile.

Every formula reads its saved tensors once, because activation checkpointing unpacks them at each read. None is
differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SPAN = 4  # longest chunks of the mLSTM from one kept state to the next: kSpan in mlstm/chunk.h
BLOCK = 32  # steps from one checkpoint of the sLSTM, the delta rule and the scan to the next: kBlock in their sources
SCAN_VECTORS = 4  # vectors of units that a task of the scan takes: kVectors in selective_scan/scan_cpu.cpp


def register_operators() -> None:
    """Register the shapes and gradients with PyTorch; once, after the library of the operators is loaded."""
    for name, (shapes, gradients, keep) in OPERATORS.items():
        torch.library.register_fake(f"xlstm_lm::{name}", shapes)
        if gradients is not None:
            torch.library.register_autograd(f"xlstm_lm::{name}", once_differentiable(gradients), setup_context=keep)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _lanes(dtype: torch.dtype) -> int:
    """Numbers in a vector register, as the library was compiled."""
    return torch.ops.xlstm_lm.simd_bytes() // dtype.itemsize


def _in_vectors(size: int, dtype: torch.dtype) -> int:
    """A size, rounded up to whole vector registers."""
    return -(-size // _lanes(dtype)) * _lanes(dtype)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _mlstm_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_state: bool,
    save: bool,
    sigmoid_gate: bool,
    normalize: bool,
    eps: float,
    chunk_length: int,
) -> tuple[Tensor, ...]:
    B, T, H, K = q.shape
    V, dtype = v.shape[-1], _compute_dtype(q)
    keys, values = (_in_vectors(size, dtype) for size in (K, V))
    last = ((B, H, K, V), (B, H, K), (B, H)) if return_state else ((0,),) * 3
    spans = -(-T // (SPAN * chunk_length))
    kept = ((B, H, T), (B, H, -(-T // chunk_length)), (B, H, spans, keys * values + keys)) if save else ((0,),) * 3
    return _like(v), *(q.new_empty(shape, dtype=dtype) for shape in (*last, *kept))


def _mlstm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, i, f, resets, C, _, _, return_state, save, *options = inputs
    assert save, "a call that needs gradients has to keep what they need"
    h, C_last, n_last, _, *kept = output
    ctx.save_for_backward(q, k, v, i, f, resets, h, *kept, C_last, n_last)
    ctx.has_state, ctx.options = C is not None, options
    ctx.mark_non_differentiable(*output[3 if return_state else 1 :])
    ctx.set_materialize_grads(False)


def _mlstm_gradients(
    ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *inputs, h, d, m, states, C_last, n_last = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(h)
    if dC is None and dn is None:
        C_last = n_last = None
    else:
        dC = torch.zeros_like(C_last) if dC is None else dC
        dn = torch.zeros_like(n_last) if dn is None else dn
    *gradients, dC, dn = torch.ops.xlstm_lm.mlstm_backward(
        *inputs, h, dh, d, m, states, C_last, n_last, dC, dn, ctx.has_state, *ctx.options
    )
    dstate = (dC, dn) if ctx.has_state else (None, None)
    return *gradients, None, *dstate, *(None,) * 7


def _mlstm_backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    h: Tensor,
    dh: Tensor,
    d: Tensor,
    m: Tensor,
    states: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    has_initial_state = others[4]
    B, _, H, K = q.shape
    dstate = ((B, H, K, v.shape[-1]), (B, H, K)) if has_initial_state else ((0,),) * 2
    return *map(_like, (q, k, v, i, f)), *(d.new_empty(shape) for shape in dstate)


def _slstm_shapes(wx: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, T, _, H, D = wx.shape
    save = others[-1]
    blocks = -(-T // BLOCK) if save else 0
    state = (wx.new_empty(B, H, D) for _ in range(3))
    return wx.new_empty(B, T, H, D), *state, wx.new_empty(blocks, 3, B, H, D)


def _slstm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, save = inputs
    assert save, "a call that needs gradients has to keep what they need"
    y, _, _, m, checkpoints = output
    ctx.save_for_backward(*tensors, y, checkpoints)
    ctx.mark_non_differentiable(m, checkpoints)
    ctx.set_materialize_grads(False)


def _slstm_gradients(
    ctx: Any, dy: Tensor | None, dc: Tensor | None, dn: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *inputs, y_initial, y, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    if dc is not None or dn is not None:
        dc, dn = (torch.zeros_like(y[:, 0]) if each is None else each.contiguous() for each in (dc, dn))
    *gradients, dy, dc, dn = torch.ops.xlstm_lm.slstm_backward(*inputs, y_initial, y, checkpoints, dy, dc, dn)
    dstate = (None, None, None) if y_initial is None else (dy, dc, dn)
    return *gradients, None, *dstate, None, None


def _slstm_backward_shapes(
    wx: Tensor, r: Tensor, bias: Tensor, resets: Tensor | None, y_initial: Tensor | None, y: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return *map(_like, (wx, r, bias)), *(torch.empty_like(y[:, 0]).contiguous() for _ in range(3))


def _gated_delta_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    C: Tensor,
    save: bool,
) -> tuple[Tensor, ...]:
    (B, T, H, V), K = v.shape, q.shape[-1]
    kept = C.new_empty(B if save else 0, H, -(-T // BLOCK), K * _in_vectors(V, C.dtype))
    return C.new_empty(v.shape), C.new_empty(C.shape), kept


def _gated_delta_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, save = inputs
    assert save, "a call that needs gradients has to keep what they need"
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gated_delta_gradients(ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dh = torch.zeros_like(saved[2]) if dh is None else dh
    *gradients, dC = torch.ops.xlstm_lm.gated_delta_backward(*saved, dh, dlast)
    return *gradients, None, dC, None


def _gated_delta_backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    kept: Tensor,
    dh: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, ...]:
    B, _, H, K = q.shape
    return *map(_like, (q, k, v, log_decay, beta)), kept.new_empty(B, H, K, v.shape[-1])


def _conv_shapes(x: Tensor, *others: Any) -> Tensor:
    return _like(x)


def _conv_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, taps, bias, documents = inputs
    ctx.save_for_backward(x, taps, documents)
    ctx.has_bias = bias is not None


def _conv_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dtaps, dbias = torch.ops.xlstm_lm.conv_backward(*ctx.saved_tensors, dy)
    return dx, dtaps.sum(0), dbias.sum(0) if ctx.has_bias else None, None


def _conv_backward_shapes(x: Tensor, taps: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, _, D = x.shape
    return _like(x), taps.new_empty(B, *taps.shape), taps.new_empty(B, D)


def _scan_shapes(x: Tensor, dt: Tensor, a: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, T, E = x.shape
    N, save = a.shape[1], others[-1]
    blocks = -(-T // BLOCK) if save else 0
    return _like(x), dt.new_empty(B, E, N), dt.new_empty(blocks, B, E, N)


def _scan_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial, save = inputs
    assert save, "a call that needs gradients has to keep what they need"
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_state = initial is not None
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, dt, a, b, c, resets, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = None if dlast is None else dlast.contiguous()
    dx, ddt, da, db, dc, dstate = torch.ops.xlstm_lm.scan_backward(x, dt, a, b, c, resets, checkpoints, dy, dlast)
    db, dc = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    return dx, ddt, da.sum(0), db, dc, None, dstate if ctx.has_state else None, None


def _scan_backward_shapes(x: Tensor, dt: Tensor, a: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, T, E = x.shape
    N, units = a.shape[1], SCAN_VECTORS * _lanes(dt.dtype)
    shared = (dt.new_empty(-(-E // units), B, T, N) for _ in range(2))
    return _like(x), _like(dt), dt.new_empty(B, E, N), *shared, dt.new_empty(B, E, N)


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, Callable[..., None] | None]] = {
    "mlstm_forward": (_mlstm_shapes, _mlstm_gradients, _mlstm_keep),
    "mlstm_backward": (_mlstm_backward_shapes, None, None),
    "slstm_forward": (_slstm_shapes, _slstm_gradients, _slstm_keep),
    "slstm_backward": (_slstm_backward_shapes, None, None),
    "gated_delta_forward": (_gated_delta_shapes, _gated_delta_gradients, _gated_delta_keep),
    "gated_delta_backward": (_gated_delta_backward_shapes, None, None),
    "conv_forward": (_conv_shapes, _conv_gradients, _conv_keep),
    "conv_backward": (_conv_backward_shapes, None, None),
    "scan_forward": (_scan_shapes, _scan_gradients, _scan_keep),
    "scan_backward": (_scan_backward_shapes, None, None),
}
"""The functions of each operator: its shapes and, where it is differentiable, its gradients and its `setup_context`."""
